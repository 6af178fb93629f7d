/* SPDX-License-Identifier: Apache-2.0
 * A small thread pool. Tasks are handed out one index at a time from an atomic counter, so tiles of unequal cost balance; a task
 * must own its outputs, so who runs it does not matter. OpenMP is not used: its threads do not survive fork, and two OpenMP
 * run-times in one process can deadlock. */
#define _GNU_SOURCE
#include "base.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

struct emxi_pool {
  pthread_mutex_t lock;
  pthread_cond_t wake, done;
  pid_t pid;       /* of the process whose threads these are */
  int32_t threads; /* workers, the caller included */
  int32_t started; /* threads that run */
  uint64_t round;  /* a new value wakes the workers */
  int32_t busy;    /* workers still in this round */
  bool stop;
  emx_task_fn task;
  void *arg;
  int64_t n;
  atomic_llong next;
  struct worker {
    emxi_pool *pool;
    int32_t index;
    pthread_t thread;
  } workers[EMXI_MAX_THREADS];
};

static void drain(emxi_pool *p, int32_t worker) {
  for (;;) {
    int64_t i = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed);
    if (i >= p->n) return;
    p->task(p->arg, i, worker);
  }
}

static void *worker_main(void *arg) {
  struct worker *w = arg;
  emxi_pool *p = w->pool;
  uint64_t seen = 0;
  pthread_mutex_lock(&p->lock);
  for (;;) {
    while (p->round == seen && !p->stop) pthread_cond_wait(&p->wake, &p->lock);
    if (p->stop) break;
    seen = p->round;
    pthread_mutex_unlock(&p->lock);
    drain(p, w->index);
    pthread_mutex_lock(&p->lock);
    if (--p->busy == 0) pthread_cond_signal(&p->done);
  }
  pthread_mutex_unlock(&p->lock);
  return NULL;
}

/* Starts the threads of this process. Fewer than asked for is not an error: the caller works too. */
static void start(emxi_pool *p) {
  pthread_mutex_init(&p->lock, NULL);
  pthread_cond_init(&p->wake, NULL);
  pthread_cond_init(&p->done, NULL);
  p->pid = getpid();
  p->started = 0;
  p->round = 0;
  p->busy = 0;
  for (int32_t i = 1; i < p->threads; i++) {
    struct worker *w = &p->workers[i];
    w->pool = p;
    w->index = i;
    if (pthread_create(&w->thread, NULL, worker_main, w)) break;
    p->started++;
  }
}

emx_status emxi_pool_create(int32_t threads, emxi_pool **out) {
  emxi_pool *p = emxi_calloc(sizeof *p);
  if (!p) return emxi_fail(EMX_ERR_NOMEM, "thread pool: no memory for %zu bytes", sizeof *p);
  p->threads = threads;
  start(p);
  *out = p;
  return EMX_OK;
}

void emxi_pool_destroy(emxi_pool *p) {
  if (!p) return;
  if (p->pid == getpid()) {
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (int32_t i = 1; i <= p->started; i++) pthread_join(p->workers[i].thread, NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->wake);
    pthread_cond_destroy(&p->done);
  }
  emxi_free(p);
}

void emxi_pool_run(emxi_pool *p, int64_t n, emx_task_fn task, void *arg) {
  if (p->pid != getpid()) start(p); /* a forked child: the threads stayed behind */
  if (n == 1 || p->started == 0) {
    for (int64_t i = 0; i < n; i++) task(arg, i, 0);
    return;
  }
  pthread_mutex_lock(&p->lock);
  p->task = task;
  p->arg = arg;
  p->n = n;
  atomic_store_explicit(&p->next, 0, memory_order_relaxed);
  p->busy = p->started;
  p->round++;
  pthread_cond_broadcast(&p->wake);
  pthread_mutex_unlock(&p->lock);
  drain(p, 0);
  pthread_mutex_lock(&p->lock);
  while (p->busy) pthread_cond_wait(&p->done, &p->lock);
  pthread_mutex_unlock(&p->lock);
}
