/* Threads that stay and share work. Items do not depend on each other, so results do not depend on who runs which. */
#ifndef SPIKELLM_TEAM_H
#define SPIKELLM_TEAM_H
#include <stdint.h>

/* Items first to last of some work; what it shares with others it only reads. Nonzero where memory ran out. */
typedef int32_t Part(void *work, int64_t first, int64_t last);

/* Run `count` items on up to `threads` threads, the caller's among them; on the caller's alone while another caller has the team. */
int32_t share_work(Part *part, void *work, int64_t count, int32_t threads);
#endif
