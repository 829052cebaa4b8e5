/* Graphs of kernels for a card, and launches of one. */
#ifndef OM_CARD_GRAPH_H
#define OM_CARD_GRAPH_H

#include "card_driver.h"
#include "om_kernels.h"

/* Results of calls for a card: a CUresult as -1000 - code. */
#define OM_CARD_ERROR(code) (-1000 - (int64_t)(code))

int om_card_launch_node(const om_session *session, const om_card_node *node);

#endif
