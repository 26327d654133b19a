/* A team of threads that stays. Between two pieces of work a thread looks for the next one for a moment, then sleeps. One caller at a time has the team; others work alone.

   Whoever is free takes the next items, so nobody waits for a thread that has not begun. The gate is one word: the number of the work, how many threads are inside, and
   whether more may come in; what is to be done changes only while nobody is inside and the gate is closed. */
#include "team.h"
#if defined(_WIN32)
int32_t share_work(Part *part, void *work, int64_t count, int32_t threads) {
    (void)threads;
    return part(work, 0, count);
}
#else
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define MOST 256    /* threads */
#define SPINS 10000 /* looks at the gate before a thread sleeps: a few hundred microseconds at most */
#define OPEN 1ull
#define INSIDE 2ull
#define WORK 65536ull
#define SHARES 4 /* that each thread takes of a piece of work, one after the other */

static struct {
    atomic_ullong gate;
    atomic_llong next; /* item that nobody has taken */
    atomic_int busy, failed, sleeping, most;
    int32_t started;
    Part *part;
    void *work;
    int64_t count, share;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} team = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_items(void) {
    for (;;) {
        const int64_t first = atomic_fetch_add(&team.next, team.share), last = first + team.share;
        if (first >= team.count) return;
        if (team.part(team.work, first, last < team.count ? last : team.count)) atomic_store(&team.failed, 1);
    }
}

static inline int has_news(unsigned long long gate, unsigned long long seen) { return gate & OPEN && gate / WORK != seen; }

static unsigned long long await_work(unsigned long long seen) {
    unsigned long long gate;
    for (int spin = 0; spin < SPINS; spin++) {
        if (has_news(gate = atomic_load(&team.gate), seen)) return gate;
        pause_briefly();
    }
    pthread_mutex_lock(&team.lock);
    atomic_fetch_add(&team.sleeping, 1);
    while (!has_news(gate = atomic_load(&team.gate), seen)) pthread_cond_wait(&team.wake, &team.lock);
    atomic_fetch_sub(&team.sleeping, 1);
    pthread_mutex_unlock(&team.lock);
    return gate;
}

static void *stay(void *argument) {
    (void)argument;
    unsigned long long seen = 0;
    for (;;) {
        unsigned long long gate = await_work(seen);
        if ((int)(gate % WORK / INSIDE) >= atomic_load(&team.most)) {
            seen = gate / WORK; /* enough are inside */
        } else if (atomic_compare_exchange_strong(&team.gate, &gate, gate + INSIDE)) {
            seen = gate / WORK;
            take_items();
            atomic_fetch_sub(&team.gate, INSIDE);
        }
    }
    return NULL;
}

/* A child of a fork has none of its parent's threads. */
static void forget_threads(void) {
    team.started = 0;
    atomic_store(&team.gate, 0);
    atomic_store(&team.busy, 0);
    atomic_store(&team.sleeping, 0);
    pthread_mutex_init(&team.lock, NULL);
    pthread_cond_init(&team.wake, NULL);
}

/* As many threads as can be had, beside the caller's. */
static void have_threads(int32_t wanted) {
    static atomic_int prepared;
    if (!atomic_exchange(&prepared, 1)) pthread_atfork(NULL, NULL, forget_threads);
    while (team.started < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, stay, NULL)) break;
        pthread_detach(thread);
        team.started++;
    }
}

int32_t share_work(Part *part, void *work, int64_t count, int32_t threads) {
    if (threads > count) threads = (int32_t)count;
    if (threads > MOST) threads = MOST;
    if (threads < 2 || atomic_exchange(&team.busy, 1)) return part(work, 0, count);
    have_threads(threads - 1);
    team.part = part, team.work = work, team.count = count;
    team.share = (count + threads * SHARES - 1) / (threads * SHARES);
    atomic_store(&team.next, 0);
    atomic_store(&team.failed, 0);
    atomic_store(&team.most, threads - 1);
    atomic_store(&team.gate, (atomic_load(&team.gate) / WORK + 1) * WORK + OPEN);
    if (atomic_load(&team.sleeping)) {
        pthread_mutex_lock(&team.lock);
        pthread_cond_broadcast(&team.wake);
        pthread_mutex_unlock(&team.lock);
    }
    take_items();
    atomic_fetch_sub(&team.gate, OPEN);
    for (int64_t spin = 0; atomic_load(&team.gate) % WORK; spin++)
        if (spin < SPINS)
            pause_briefly();
        else
            sched_yield(); /* more threads than processors */
    const int32_t failed = atomic_load(&team.failed);
    atomic_store(&team.busy, 0);
    return failed;
}
#endif
