/* Every public entry that computes, on every kernel table, with each tensor, list, report and workspace ending exactly at an
 * unreadable page, and again with each starting right behind one: a byte touched outside is a crash. Both runs must give the same
 * bits, and what lies between the rows of an output stays as it was. What the results should be is asked elsewhere. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "model/model.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define OK(call)                                                                              \
  do {                                                                                        \
    emx_status ok_ = (call);                                                                  \
    if (ok_) fail_msg("%s: %s: %s (%s)", now, #call, emx_status_name(ok_), emx_last_error()); \
  } while (0)
static char now[200]; /* what is being run, for messages */
static emx_ctx *ctx;

/* ---- guarded memory, all of it freed by finish() */

enum { AT_END, AT_START, BLOCKS = 64 };
static int edge;
static struct block {
  char *base;
  size_t size;
} blocks[BLOCKS];
static int n_blocks;

static void *place(size_t bytes) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
  assert_true(n_blocks < BLOCKS);
  char *base = mmap(NULL, room + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  assert_true(base != MAP_FAILED);
  if (room) {
    assert_int_equal(mprotect(base + page, room, PROT_READ | PROT_WRITE), 0);
    memset(base + page, 0x5a, room);
  }
  blocks[n_blocks++] = (struct block){base, room + 2 * page};
  return base + page + (edge == AT_END ? room - bytes : 0);
}

/* Outputs of this run, and their bytes as one number. */
static struct output {
  emx_tensor t;
  int64_t pad;
} outputs[BLOCKS];
static int n_outputs;
static emxi_hash digest;

static int64_t span_of(const emx_tensor *t) {
  int64_t span = 1;
  for (int d = 0; d < t->ndim; d++) {
    if (!t->shape[d]) return 0;
    span += (t->shape[d] - 1) * t->stride[d];
  }
  return span;
}
/* Rows of the last dimension stand `pad` elements apart. seed 0: an output. */
static emx_tensor tensor(int32_t dtype, int ndim, const int64_t *shape, int64_t pad, uint64_t seed) {
  emx_tensor t = emx_tensor_view(NULL, dtype, ndim, shape);
  pad = ndim > 1 ? pad : 0;
  for (int d = ndim - 2; d >= 0; d--) t.stride[d] = d == ndim - 2 ? shape[ndim - 1] + pad : t.stride[d + 1] * shape[d + 1];
  const int64_t n = span_of(&t);
  t.data = place((size_t)n * emx_dtype_size(dtype));
  if (seed) {
    float *x = malloc((size_t)(n + 4) * sizeof *x);
    emxi_normals(seed, 0, x, n);
    for (int64_t i = 0; i < n; i++) emxi_store(t.data, dtype, i, x[i]);
    free(x);
  } else {
    assert_true(n_outputs < BLOCKS);
    outputs[n_outputs++] = (struct output){t, pad};
  }
  return t;
}
static emx_tensor ints(int ndim, const int64_t *shape, const int32_t *values) {
  emx_tensor t = emx_tensor_view(NULL, EMX_I32, ndim, shape);
  t.data = place((size_t)span_of(&t) * 4);
  memcpy(t.data, values, (size_t)span_of(&t) * 4);
  return t;
}
static emx_tensor doubles(int64_t n, const double *values) {
  emx_tensor t = emx_tensor_view(NULL, EMX_F64, 1, &n);
  t.data = place((size_t)n * 8);
  memcpy(t.data, values, (size_t)n * 8);
  return t;
}

/* Takes up the outputs, then gives everything back. */
static void finish(uint8_t out[EMXI_HASH_SIZE]) {
  for (int i = 0; i < n_outputs; i++) {
    const emx_tensor *t = &outputs[i].t;
    const int64_t row = t->ndim ? t->shape[t->ndim - 1] : 1, n = span_of(t);
    const size_t es = emx_dtype_size(t->dtype);
    emxi_hash_add(&digest, t->data, (size_t)n * es);
    for (int64_t at = row; outputs[i].pad && at < n; at += row + outputs[i].pad)
      for (size_t b = 0; b < (size_t)outputs[i].pad * es; b++)
        if (((uint8_t *)t->data)[(size_t)at * es + b] != 0x5a) fail_msg("%s: output %d: a byte between rows was written", now, i);
  }
  emxi_hash_end(&digest, out);
  for (int i = 0; i < n_blocks; i++) munmap(blocks[i].base, blocks[i].size);
  n_blocks = n_outputs = 0;
}
#define BOTH_EDGES(call)                                                                                             \
  do {                                                                                                               \
    uint8_t digests[2][EMXI_HASH_SIZE];                                                                              \
    for (edge = AT_END; edge <= AT_START; edge++) {                                                                  \
      emxi_hash_init(&digest);                                                                                       \
      call;                                                                                                          \
      finish(digests[edge]);                                                                                         \
    }                                                                                                                \
    if (memcmp(digests[0], digests[1], EMXI_HASH_SIZE)) fail_msg("%s: where a tensor lies changes the result", now); \
  } while (0)

/* cmocka would say that there was a segmentation fault, in which it cannot say: workers are threads. */
static void crashed(int number) {
  (void)number;
  static const char text[] = ": a byte outside of a tensor was touched\n";
  if (write(STDERR_FILENO, now, strlen(now)) > 0 && write(STDERR_FILENO, text, sizeof text - 1) > 0) _exit(1);
  _exit(1);
}

/* f once on every table that this CPU can run. */
static void on_tables(void (*f)(void)) {
  static const char *const tables[] = {"scalar", "avx2", "avx512"};
  signal(SIGSEGV, crashed);
  signal(SIGBUS, crashed);
  for (int i = 0; i < 3; i++) {
    emx_ctx_opts o;
    emx_ctx_opts_init(&o);
    o.threads = 2;
    setenv("EMX_ISA", tables[i], 1);
    const emx_status status = emx_ctx_create(&o, &ctx);
    if (i && status) continue;
    assert_int_equal(status, EMX_OK);
    f();
    emx_ctx_destroy(ctx);
  }
  unsetenv("EMX_ISA");
}
static const char *isa(void) {
  static emx_ctx_info info;
  info.struct_size = sizeof info;
  return emx_ctx_get_info(ctx, &info) ? "?" : info.isa;
}

/* ---- mapping */

enum { R = 3 };
static void map_case(int32_t dtype, int64_t n, int64_t pad, int32_t kind, double alpha) {
  const int64_t shape[2] = {R, n}, rows = R, one = 1;
  const double alphas[R] = {alpha, alpha, alpha};
  const int32_t targets[R] = {0, (int32_t)n - 1, -100}, sum = dtype == EMX_F64 ? EMX_F64 : EMX_F32;
  emx_tensor x = tensor(dtype, 2, shape, pad, 1), p = tensor(dtype, 2, shape, pad, 0), tau = tensor(sum, 1, &rows, 0, 0),
             support = tensor(EMX_I32, 1, &rows, 0, 0), dp = tensor(dtype, 2, shape, pad, 2),
             dx = tensor(dtype, 2, shape, pad, 0), by_row = doubles(R, alphas), d_alpha = tensor(EMX_F64, 1, &rows, 0, 0),
             target = ints(1, &rows, targets), loss = tensor(sum, 1, &rows, 0, 0), total = tensor(sum, 1, &one, 0, 0),
             dl = tensor(dtype, 2, shape, pad, 0);
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  desc.kind = kind;
  desc.alpha = alpha;
  desc.budget = n > 2 ? 1.5 : 1;
  emx_entmax_io io;
  emx_entmax_io_init(&io);
  io.x = &x;
  io.p = &p;
  io.tau = &tau;
  io.support = &support;
  io.alpha = n % 2 ? &by_row : NULL;
  OK(emx_entmax_forward(ctx, &desc, &io));
  io.x = io.tau = io.support = NULL;
  io.dp = &dp;
  io.dx = &dx;
  io.d_alpha = kind == EMX_MAP_ENTMAX ? &d_alpha : NULL;
  OK(emx_entmax_backward(ctx, &desc, &io));
  if (kind == EMX_MAP_BUDGET) return;
  emx_loss_io li;
  emx_loss_io_init(&li);
  li.x = &x;
  li.target = &target;
  li.loss = &loss;
  li.reduction = EMX_REDUCE_MEAN;
  li.total = &total;
  li.dx = &dl;
  OK(emx_entmax_loss(ctx, &desc, &li));
}
static void maps(void) {
  static const int32_t dtypes[] = {EMX_F32, EMX_F16, EMX_BF16, EMX_F64};
  static const int64_t sizes[] = {1, 7, 16, 33, 130, 517};
  static const struct {
    int32_t kind;
    double alpha;
  } cases[] = {{EMX_MAP_ENTMAX, 1},   {EMX_MAP_ENTMAX, 1.5}, {EMX_MAP_ENTMAX, 2},
               {EMX_MAP_ENTMAX, 1.3}, {EMX_MAP_NORMMAX, 2},  {EMX_MAP_BUDGET, 1.5}};
  for (int d = 0; d < 4; d++)
    for (int s = 0; s < 6; s++)
      for (int c = 0; c < 6; c++) {
        snprintf(now, sizeof now, "%s: map %s n %d kind %d alpha %g", isa(), emx_dtype_name(dtypes[d]), (int)sizes[s],
                 cases[c].kind, cases[c].alpha);
        BOTH_EDGES(map_case(dtypes[d], sizes[s], (s + c) % 2 * 3, cases[c].kind, cases[c].alpha));
      }
}
static void test_maps(void **state) {
  (void)state;
  on_tables(maps);
}

/* ---- dense attention */

enum { B = 2, H = 4, G = 2, S = 7, N = 37, C = 5 };
enum { PADDED, PACKED, PAGED };
typedef struct attn_case {
  int32_t dtype, q_dtype, layout, mode;
  int64_t D, pad;
  double alpha;
  bool by_head, causal, lists;
} attn_case;

/* [B,heads,n,D] in either layout, [B*n,heads,D] packed. */
static emx_tensor heads_of(const attn_case *c, int32_t dtype, int64_t heads, int64_t n, int64_t d, uint64_t seed) {
  if (c->mode == PACKED) return tensor(dtype, 3, (int64_t[]){B * n, heads, d}, c->pad, seed);
  const bool hnd = c->layout == EMX_LAYOUT_BHND;
  return tensor(dtype, 4, (int64_t[]){B, hnd ? heads : n, hnd ? n : heads, d}, c->pad, seed);
}
static emx_tensor rows_of(const attn_case *c, int32_t dtype, int64_t heads, int64_t n) {
  if (c->mode == PACKED) return tensor(dtype, 2, (int64_t[]){B * n, heads}, 0, 0);
  const bool hnd = c->layout == EMX_LAYOUT_BHND;
  return tensor(dtype, 3, (int64_t[]){B, hnd ? heads : n, hnd ? n : heads}, 0, 0);
}
static void attn_run(const attn_case *c) {
  enum { P = 16, M = 3, POOL = 6 };
  static const double alphas[H] = {1.5, 1.3, 2, 1.7};
  static const int32_t cu_q[B + 1] = {0, S, S + 3}, cu_k[B + 1] = {0, N, N + 20}, lens_q[B] = {S, 3}, lens_k[B] = {N, 20},
                                pages[B * M] = {5, 0, 3, 1, 2, -1};
  const int64_t h = H, b = B, b1 = B + 1, table[2] = {B, M};
  const int32_t wide = c->dtype == EMX_F64 ? EMX_F64 : EMX_F32;
  const bool soft = c->alpha == 1 && !c->by_head, hnd = c->layout == EMX_LAYOUT_BHND;
  emx_attn_desc desc;
  emx_attn_io io;
  emx_attn_desc_init(&desc);
  emx_attn_io_init(&io);
  desc.alpha = c->alpha;
  desc.layout = c->layout;
  desc.flags = c->causal ? EMX_ATTN_CAUSAL : 0;
  if (!c->causal) desc.window_left = 11, desc.window_right = 4;
  emx_tensor q = heads_of(c, c->q_dtype, H, S, c->D, 1), k, v, o = heads_of(c, c->q_dtype, H, S, c->D, 0),
             tau = rows_of(c, wide, H, S), support = rows_of(c, EMX_I32, H, S), slopes = tensor(EMX_F32, 1, &h, 0, 3),
             by_head = doubles(H, alphas), q_lens = ints(1, &b, lens_q), k_lens = ints(1, &b, lens_k), q_cu = ints(1, &b1, cu_q),
             k_cu = ints(1, &b1, cu_k), block_table = ints(2, table, pages), lists = {0};
  for (int i = 0; i < H; i++) ((float *)slopes.data)[i] = i % 2 ? 0.1f : 0;
  if (c->mode == PAGED) {
    const int64_t pool[4] = {POOL, hnd ? G : P, hnd ? P : G, c->D};
    k = tensor(c->dtype, 4, pool, c->pad, 4);
    v = tensor(c->dtype, 4, pool, c->pad, 5);
    io.block_table = &block_table;
    io.seqlens_k = &k_lens;
  } else {
    k = heads_of(c, c->dtype, G, N, c->D, 4);
    v = heads_of(c, c->dtype, G, N, c->D, 5);
  }
  if (c->mode == PADDED) io.seqlens_q = &q_lens, io.seqlens_k = &k_lens;
  if (c->mode == PACKED) io.cu_seqlens_q = &q_cu, io.cu_seqlens_k = &k_cu;
  io.q = &q;
  io.k = &k;
  io.v = &v;
  io.o = &o;
  *(soft ? &io.lse : &io.tau) = &tau;
  io.support = &support;
  io.alibi_slopes = &slopes;
  if (c->by_head) io.alphas = &by_head;
  if (c->lists && !soft) {
    lists = heads_of(c, EMX_I32, H, S, C, 0);
    io.support_index = &lists;
  }
  size_t bytes;
  OK(emx_attn_workspace_size(ctx, &desc, &io, EMX_PASS_FORWARD, &bytes));
  OK(emx_attn_forward(ctx, &desc, &io, place(bytes), bytes));
  if (c->mode == PAGED) return;
  emx_tensor d_o = heads_of(c, c->q_dtype, H, S, c->D, 6), dq = heads_of(c, c->q_dtype, H, S, c->D, 0),
             dk = heads_of(c, c->dtype, G, N, c->D, 0), dv = heads_of(c, c->dtype, G, N, c->D, 0),
             d_alpha = tensor(EMX_F64, 1, &h, 0, 0);
  io.d_o = &d_o;
  io.d_q = &dq;
  io.d_k = &dk;
  io.d_v = &dv;
  if (c->by_head) io.d_alpha = &d_alpha;
  OK(emx_attn_workspace_size(ctx, &desc, &io, EMX_PASS_BACKWARD, &bytes));
  OK(emx_attn_backward(ctx, &desc, &io, place(bytes), bytes));
}
static void attention(void) {
  static const int32_t dtypes[] = {EMX_F32, EMX_F16, EMX_BF16, EMX_F64};
  static const int64_t dims[] = {16, 17, 40, 80, 96, 128}, dims64[] = {1, 5, 16, 33, 80, 96};
  static const double alphas[] = {1.5, 1, 2, 1.25};
  int turn = 0;
  for (int t = 0; t < 4; t++)
    for (int i = 0; i < 6; i++)
      for (int mode = PADDED; mode <= PAGED; mode++, turn++) {
        attn_case c = {.dtype = dtypes[t],
                       .q_dtype = t < 3 && turn % 4 == 1 ? EMX_F32 : dtypes[t],
                       .layout = turn / 2 % 2 ? EMX_LAYOUT_BNHD : EMX_LAYOUT_BHND,
                       .mode = mode,
                       .D = t == 3 ? dims64[i] : dims[i],
                       .pad = turn % 5 == 2 ? 3 : 0,
                       .alpha = alphas[turn % 4],
                       .by_head = turn % 7 == 3,
                       .causal = turn % 3 != 1,
                       .lists = turn % 2};
        if (c.mode == PAGED && c.lists && c.by_head) c.lists = false;
        snprintf(now, sizeof now, "%s: attention %s q %s layout %d mode %d D %d pad %d alpha %g%s%s%s", isa(),
                 emx_dtype_name(c.dtype), emx_dtype_name(c.q_dtype), c.layout, c.mode, (int)c.D, (int)c.pad, c.alpha,
                 c.by_head ? " by head" : "", c.causal ? " causal" : "", c.lists ? " lists" : "");
        BOTH_EDGES(attn_run(&c));
      }
}
static void test_attention(void **state) {
  (void)state;
  on_tables(attention);
}

/* ---- cache: append, summaries, selection, decode */

typedef struct kv_case {
  int32_t dtype, q_dtype, layout, P;
  int64_t D, pad;
  bool same; /* new tokens in the cache's dtype */
} kv_case;

static emx_tensor bhnd(const kv_case *c, int32_t dtype, int64_t heads, int64_t n, uint64_t seed) {
  const bool hnd = c->layout == EMX_LAYOUT_BHND;
  return tensor(dtype, 4, (int64_t[]){B, hnd ? heads : n, hnd ? n : heads, c->D}, c->pad, seed);
}
static emx_report *reports_at(int64_t n) {
  const int64_t words = n * (int64_t)sizeof(emx_report) / 4;
  return tensor(EMX_I32, 1, &words, 0, 0).data;
}
static void kv_run(const kv_case *c) {
  enum { POOL = 9, M = 4 };
  static const int32_t table[B * M] = {7, 2, 0, 8, 4, 6, 1, -1}, fresh[B] = {20, 11}, pages[2] = {7, 4}, held[2] = {16, 11};
  static const double alphas[H] = {1.5, 1.3, 2, 1.7};
  const bool hnd = c->layout == EMX_LAYOUT_BHND;
  const int64_t pool[4] = {POOL, hnd ? G : c->P, hnd ? c->P : G, c->D}, b = B, two = 2, h = H, tables[2] = {B, M};
  int32_t lengths[B] = {0, 0};
  emx_tensor k = tensor(c->dtype, 4, pool, c->pad, 0), v = tensor(c->dtype, 4, pool, c->pad, 0);
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.dtype = c->dtype;
  o.kv_heads = G;
  o.head_dim = (int32_t)c->D;
  o.page_size = c->P;
  o.layout = c->layout;
  o.summaries = EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS | EMX_SUMMARY_SKETCH | EMX_SUMMARY_RESIDUAL;
  o.max_pages = POOL;
  o.k_pool = &k;
  o.v_pool = &v;
  emx_kv *kv;
  OK(emx_kv_create(ctx, &o, &kv));
  const int32_t new_dtype = c->same ? c->dtype : EMX_F32;
  emx_tensor tab = ints(2, tables, table), lens = ints(1, &b, lengths), n_new = ints(1, &b, fresh),
             tk = bhnd(c, new_dtype, G, 20, 1), tv = bhnd(c, new_dtype, G, 20, 2), tp = ints(1, &two, pages),
             tt = ints(1, &two, held);
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = B;
  batch.block_table = &tab;
  batch.seq_lens = &lens;
  OK(emx_kv_append(ctx, kv, &batch, &tk, &tv, &n_new));
  memcpy(lens.data, fresh, sizeof fresh);
  OK(emx_kv_append(ctx, kv, &batch, &tk, &tv, &n_new)); /* into pages that are open */
  for (int i = 0; i < B; i++) ((int32_t *)lens.data)[i] = 2 * fresh[i];
  if (c->P == 16) OK(emx_kv_summarize(ctx, kv, &tp, &tt));

  emx_tensor by_head = doubles(H, alphas), slopes = tensor(EMX_F32, 1, &h, 0, 3);
  for (int i = 0; i < H; i++) ((float *)slopes.data)[i] = i % 2 ? 0.2f : 0;
  for (int32_t kind = EMX_SELECT_ALL; kind <= EMX_SELECT_PAGES; kind++) {
    const int64_t s = kind == EMX_SELECT_ALL ? 3 : 1;
    emx_tensor q = bhnd(c, c->q_dtype, H, s, 4), out = bhnd(c, c->q_dtype, H, s, 0), kn = bhnd(c, new_dtype, G, s, 5),
               vn = bhnd(c, new_dtype, G, s, 6), lists = tensor(EMX_I32, 4, (int64_t[]){B, H, s, M}, 0, 0),
               n_pages = tensor(EMX_I32, 3, (int64_t[]){B, H, s}, 0, 0), bound = tensor(EMX_F32, 3, (int64_t[]){B, H, s}, 0, 0);
    emx_select_desc select;
    emx_decode_io io;
    emx_select_desc_init(&select);
    emx_decode_io_init(&io);
    select.kind = kind == EMX_SELECT_PAGES ? EMX_SELECT_TOPK : kind;
    select.budget = 2 * c->P;
    io.layout = c->layout;
    io.alpha = kind == EMX_SELECT_TOPK ? 1 : 1.5;
    io.q = &q;
    io.alibi_slopes = &slopes;
    io.alphas = c->pad ? &by_head : NULL;
    io.pages = &lists;
    io.n_pages = &n_pages;
    io.bound = &bound;
    size_t bytes;
    if (kind != EMX_SELECT_CERTIFIED) { /* which has no lists */
      OK(emx_decode_workspace_size(ctx, kv, &select, &io, M * c->P, &bytes));
      OK(emx_select(ctx, kv, &batch, &select, &io, place(bytes), bytes));
    }
    select.kind = kind;
    io.o = &out;
    io.reports = reports_at(B * H * s);
    if (kind != EMX_SELECT_PAGES) { /* which reads the lists, and appends as well */
      io.pages = io.n_pages = io.bound = NULL;
      io.k_new = &kn;
      io.v_new = &vn;
    }
    OK(emx_decode_workspace_size(ctx, kv, &select, &io, M * c->P, &bytes));
    OK(emx_decode(ctx, kv, &batch, &select, &io, place(bytes), bytes));
  }
  emx_kv_destroy(kv);
}
static void caches(void) {
  static const int32_t dtypes[] = {EMX_F32, EMX_F16, EMX_BF16};
  static const int64_t dims[] = {16, 17, 40, 96};
  int turn = 0;
  for (int t = 0; t < 3; t++)
    for (int i = 0; i < 4; i++)
      for (int layout = EMX_LAYOUT_BHND; layout <= EMX_LAYOUT_BNHD; layout++, turn++) {
        const kv_case c = {.dtype = dtypes[t],
                           .q_dtype = turn % 3 ? EMX_F32 : dtypes[t],
                           .layout = layout,
                           .P = turn % 4 == 1 ? 32 : 16,
                           .D = dims[i],
                           .pad = turn % 5 % 2 * 3,
                           .same = turn % 2};
        snprintf(now, sizeof now, "%s: cache %s q %s layout %d P %d D %d pad %d", isa(), emx_dtype_name(c.dtype),
                 emx_dtype_name(c.q_dtype), layout, c.P, (int)c.D, (int)c.pad);
        BOTH_EDGES(kv_run(&c));
      }
}
static void test_caches(void **state) {
  (void)state;
  on_tables(caches);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_maps), cmocka_unit_test(test_attention),
                                     cmocka_unit_test(test_caches)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
