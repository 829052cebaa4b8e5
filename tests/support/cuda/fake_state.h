/* What a test sets and reads of the fake driver: options, injected failures, counters, and the problems that it found. */
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace fake {

struct options {
    int64_t order = 0;          /* 0: as late as possible, the oldest first; 1: the newest first; others: any, at random */
    int64_t eager = 0;          /* operations run when they are queued */
    int64_t late_copies = 0;    /* copies run when nothing else can */
    int64_t no_kernels = 0;     /* nothing runs but the kernels named by omFakeExecute; copies do not either */
    int64_t aliases = 0;        /* the card has other addresses for page-locked memory, as on WDDM */
    int64_t batches = 0;        /* what is queued begins only at a query or a synchronization, as on WDDM */
    int64_t vram = 8ll << 30;
    int64_t vram_elsewhere = 0; /* taken by the desktop */
    int64_t lockable = 1ll << 40, lock_error = 2; /* bytes that may be page-locked, and the code beyond that */
    int64_t lost_after = -1, lost_code = 719;     /* operations until the card is lost */
    int64_t architecture = 86, num_cards = 1;
    int64_t adopts = 0;         /* memory of the process that is not declared the host's counts as the card's: torch's stands for it */
    int64_t node_bytes = 0;     /* VRAM that a node of an executable graph occupies */
    int64_t at_once = 0;        /* calls of passes return at once, for measuring the host's: routers find all experts on the card */
};

struct failure {
    int64_t after;
    int code;
};

inline options set;
inline std::map<std::string, failure> failures; /* by call */
inline std::map<std::string, int64_t> counts;
inline std::vector<std::string> problems;
inline std::set<std::string> executed; /* kernels, in spite of no_kernels */
inline std::recursive_mutex lock;

inline int64_t *option(const std::string &name) {
    static const std::map<std::string, int64_t options::*> all = {
        {"order", &options::order}, {"eager", &options::eager}, {"late_copies", &options::late_copies},
        {"no_kernels", &options::no_kernels}, {"aliases", &options::aliases}, {"batches", &options::batches},
        {"vram", &options::vram}, {"vram_elsewhere", &options::vram_elsewhere}, {"lockable", &options::lockable},
        {"lock_error", &options::lock_error}, {"lost_after", &options::lost_after}, {"lost_code", &options::lost_code},
        {"architecture", &options::architecture}, {"num_cards", &options::num_cards}, {"adopts", &options::adopts},
        {"node_bytes", &options::node_bytes}, {"at_once", &options::at_once}};
    const auto found = all.find(name);
    return found == all.end() ? nullptr : &(set.*found->second);
}

/* Each problem once: the same order is missing in every token. */
inline void report(const std::string &text) {
    if (problems.size() < 100 && std::set<std::string>(problems.begin(), problems.end()).count(text) == 0) problems.push_back(text);
}

/* The code that a call returns before it does anything; 0: it goes on. */
inline int injected(const char *call) {
    counts[call]++;
    if (set.lost_after == 0) return (int)set.lost_code;
    const auto found = failures.find(call);
    if (found == failures.end() || found->second.after-- > 0) return 0;
    const int code = found->second.code;
    failures.erase(found);
    return code;
}

} // namespace fake
