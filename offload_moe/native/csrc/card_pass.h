/* A pass of the card: what its two ways share. */
#ifndef OM_CARD_PASS_C_H
#define OM_CARD_PASS_C_H

#include "../cuda/pass.h"
#include "card_graph.h"
#include "slot_table.h"

/* Where a pass is. */
enum { OM_CARD_IDLE, OM_CARD_RUNNING /* queued */, OM_CARD_ROUTING /* stepwise: layer `at` is on the card */, OM_CARD_COMPUTING, OM_CARD_ENDING };

struct om_device_pass {
    const om_card_options *options;
    const om_session *session;
    const om_driver *driver;
    om_card_notice *notice; /* what the card reports, as of its options */
    const om_card_steps *steps;
    void *end;           /* the last graph of this pass */
    int state;
    int64_t at;          /* layer */
    int64_t num_rows;
    uint32_t token;      /* that the device has; counted here as the device's last kernel does */
    double expected_s;   /* of a queued pass, from its last ones */
    double began_s;
    double cpu_s;        /* seconds of the CPU's share of this pass */
    int64_t num_on_cpu;  /* experts that it has computed */
    uint8_t is_done[OM_CARD_PAIRS]; /* pairs of the layer that the CPU has computed */
};

double om_card_seconds(void);
/* Launch a graph; 0 or the driver's code. */
int om_card_run_graph(const om_device_pass *pass, void *graph);
/* The end of a pass behind its last layer: the last graph, and the log's way to the host. */
int om_card_queue_end(om_device_pass *pass);
/* Continue stepwise, at most until `deadline_s`. The results of `om_card_next`. */
int64_t om_card_step(om_device_pass *pass, double deadline_s);
/* 1: all that was queued has run; 0: not yet; negative: OM_CARD_ERROR. */
int64_t om_card_is_idle(const om_device_pass *pass);

#endif
