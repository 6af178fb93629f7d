/* Sequences of cache operations against a naive model (each sequence an array of token ids), and decodes whose every claim is
 * checked against the float64 oracle over the model's tokens.
 * Input: shape bytes, then operations of one opcode byte and their arguments. */
#include "base/num.h"
#include "entmax/entmax.h"
#include "fuzz/fuzz.h"

#include <unistd.h>

enum { SEQS = 4, PAGES = 9, LENGTH = PAGES * 64, MAX_D = 40, MAX_G = 2, OPS = 60 };

typedef struct model {
  bool used;
  int64_t n;
  uint16_t ids[LENGTH];
} model;

/* K of a token id; V is a different one. A few ids are odd: 0xfff0 and above hold a NaN or an infinity. */
static float element(uint32_t id, int what, int g, int d) {
  if (id >= 0xfff0 && what == 0 && d == (int)(id & 3)) return id & 8 ? NAN : id & 4 ? INFINITY : -INFINITY;
  uint32_t x = (id * 2654435761u) ^ (uint32_t)(what * 40503 + g * 9176 + d * 668265263u);
  x ^= x >> 15;
  x *= 2246822519u;
  x ^= x >> 13;
  float scale = id % 7 == 0 ? 4.0f : id % 5 == 0 ? 0.01f : 1.0f;
  return scale * (float)((int)(x % 513) - 256) / 128.0f;
}
static double stored(uint32_t id, int what, int g, int d, int32_t dtype) {
  double cell;
  emxi_store(&cell, dtype, 0, (double)element(id, what, g, d));
  return emxi_load(&cell, dtype, 0);
}

typedef struct world {
  emx_ctx *ctx;
  emx_kv *kv;
  int32_t G, D, P, dtype, layout, summaries;
  bool in_file;
  model seq[SEQS];
} world;

static void check_contents(const world *w) {
  emx_tensor k = {0}, v = {0};
  emx_kv_info info = {.struct_size = sizeof info};
  const emx_status view = emx_kv_pool_view(w->kv, &k, &v); /* of what is in a file there is none: decodes see the contents */
  FUZZ_CHECK(view == (w->in_file ? EMX_ERR_UNSUPPORTED : EMX_OK), "%s", emx_last_error());
  FUZZ_CHECK(!emx_kv_get_info(w->kv, &info), "%s", emx_last_error());
  const int head = w->layout == EMX_LAYOUT_BHND ? 1 : 2, token = 3 - head;
  int32_t held[PAGES] = {0}, seqs = 0;
  for (int s = 0; s < SEQS; s++) {
    const model *m = &w->seq[s];
    int64_t n = -1, pages_n;
    const int32_t *pages;
    if (!m->used) {
      FUZZ_CHECK(emx_seq_length(w->kv, s, &n) == EMX_ERR_STATE && n == -1, "sequence %d should not exist", s);
      continue;
    }
    seqs++;
    FUZZ_CHECK(!emx_seq_length(w->kv, s, &n) && n == m->n, "length %d, model %d", (int)n, (int)m->n);
    FUZZ_CHECK(!emx_seq_block_table(w->kv, s, &pages, &pages_n) && pages_n == (n + w->P - 1) / w->P, "%d pages", (int)pages_n);
    for (int64_t p = 0; p < pages_n; p++) {
      FUZZ_CHECK(pages[p] >= 0 && pages[p] < PAGES, "page %d", pages[p]);
      held[pages[p]]++;
    }
    for (int64_t j = 0; j < n && !w->in_file; j++)
      for (int g = 0; g < w->G; g++)
        for (int d = 0; d < w->D; d += 5) {
          const int64_t kat = pages[j / w->P] * k.stride[0] + g * k.stride[head] + j % w->P * k.stride[token] + d;
          const double x = emxi_load(k.data, k.dtype, kat), y = stored(m->ids[j], 0, g, d, w->dtype);
          FUZZ_CHECK(x == y || (isnan(x) && isnan(y)), "sequence %d token %d: %g, model %g", s, (int)j, x, y);
          FUZZ_CHECK(emxi_load(v.data, v.dtype, kat) == stored(m->ids[j], 1, g, d, w->dtype), "value of token %d", (int)j);
        }
  }
  int64_t free_pages = 0;
  for (int p = 0; p < PAGES; p++) free_pages += !held[p];
  FUZZ_CHECK(info.free_pages == free_pages && info.seqs == seqs, "%d free pages, model %d", (int)info.free_pages,
             (int)free_pages);
}

static void append(world *w, fuzz_input *in) {
  static float k[SEQS * MAX_G * 70 * MAX_D], v[SEQS * MAX_G * 70 * MAX_D];
  int32_t seqs[SEQS], n[SEQS], b = 0, most = 0;
  uint16_t first[SEQS];
  const uint8_t which = fuzz_u8(in);
  for (int s = 0; s < SEQS; s++)
    if (which >> s & 1) {
      seqs[b] = s;
      n[b] = fuzz_u8(in) % 70;
      first[b] = fuzz_u16(in);
      most = n[b] > most ? n[b] : most;
      b++;
    }
  for (int i = 0; i < b; i++)
    for (int g = 0; g < w->G; g++)
      for (int t = 0; t < n[i]; t++)
        for (int d = 0; d < w->D; d++) {
          const int64_t at =
              w->layout == EMX_LAYOUT_BHND ? ((i * w->G + g) * most + t) * w->D + d : ((i * most + t) * w->G + g) * w->D + d;
          k[at] = element((uint16_t)(first[i] + t), 0, g, d);
          v[at] = element((uint16_t)(first[i] + t), 1, g, d);
        }
  int64_t shape[4] = {b, w->layout == EMX_LAYOUT_BHND ? w->G : most, w->layout == EMX_LAYOUT_BHND ? most : w->G, w->D};
  emx_tensor tk = emx_tensor_view(k, EMX_F32, 4, shape), tv = emx_tensor_view(v, EMX_F32, 4, shape);
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = b;
  batch.seqs = seqs;
  const int64_t rows = b;
  const emx_tensor tn = emx_tensor_view(n, EMX_I32, 1, &rows);
  emx_status status = emx_kv_append(w->ctx, w->kv, &batch, &tk, &tv, &tn);
  bool known = true;
  for (int i = 0; i < b; i++) known &= w->seq[seqs[i]].used;
  if (!known) {
    FUZZ_CHECK(status == EMX_ERR_STATE, "append to a sequence that does not exist: %d", status);
    return;
  }
  FUZZ_CHECK(!status || status == EMX_ERR_STATE, "%s", emx_last_error());
  if (status) return; /* out of pages: check_contents sees that nothing has changed */
  for (int i = 0; i < b; i++)
    for (int t = 0; t < n[i]; t++) w->seq[seqs[i]].ids[w->seq[seqs[i]].n++] = (uint16_t)(first[i] + t);
}

static void decode(world *w, fuzz_input *in) {
  static const double alphas[] = {1.5, 1, 2, 1.25, 3};
  static char workspace[1 << 20];
  static double s[LENGTH], p[LENGTH];
  const int32_t seq = fuzz_u8(in) % SEQS, kind = fuzz_u8(in) % 3, H = w->G * (1 + fuzz_u8(in) % 3);
  const double alpha = alphas[fuzz_u8(in) % 5];
  const model *m = &w->seq[seq];
  float q[MAX_G * 3 * MAX_D], o[MAX_G * 3 * MAX_D], slopes[MAX_G * 3], bound[MAX_G * 3];
  int32_t pages[MAX_G * 3 * (LENGTH / 16)], n_pages[MAX_G * 3];
  emx_report reports[MAX_G * 3];
  const uint16_t qid = fuzz_u16(in) % 0xfff0;
  const uint8_t slope = fuzz_u8(in);
  for (int h = 0; h < H; h++) {
    slopes[h] = slope & 1 ? ((float)((slope >> 1) % 16) - 4) / 8 * (float)(h % 2) : 0;
    for (int d = 0; d < w->D; d++) q[h * w->D + d] = 2 * element(qid, 2 + h, 0, d);
  }
  int64_t shape[4] = {1, H, 1, w->D}, pshape[4] = {1, H, 1, LENGTH / 16}, hs[1] = {H};
  emx_tensor tq = emx_tensor_view(q, EMX_F32, 4, shape), to = emx_tensor_view(o, EMX_F32, 4, shape),
             ts = emx_tensor_view(slopes, EMX_F32, 1, hs), tp = emx_tensor_view(pages, EMX_I32, 4, pshape),
             tn = emx_tensor_view(n_pages, EMX_I32, 3, pshape), tb = emx_tensor_view(bound, EMX_F32, 3, pshape);
  emx_select_desc select;
  emx_select_desc_init(&select);
  select.kind = kind;
  select.budget = fuzz_u8(in) * 2;
  emx_decode_io io;
  emx_decode_io_init(&io);
  io.alpha = alpha;
  io.q = &tq;
  io.o = &to;
  io.alibi_slopes = &ts;
  io.pages = &tp;
  io.n_pages = &tn;
  io.bound = &tb;
  io.reports = reports;
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &seq;
  size_t bytes = 0;
  emx_status status = emx_decode_workspace_size(w->ctx, w->kv, &select, &io, LENGTH, &bytes);
  if (status == EMX_ERR_STATE || (kind == EMX_SELECT_GAUSSIAN && alpha == 1)) {
    FUZZ_CHECK(status, "a selector without its summaries");
    return;
  }
  FUZZ_CHECK(!status && bytes <= sizeof workspace, "%s, %zu bytes", emx_last_error(), bytes);
  status = emx_select(w->ctx, w->kv, &batch, &select, &io, workspace, bytes);
  if (!m->used) {
    FUZZ_CHECK(status == EMX_ERR_STATE, "a sequence that does not exist");
    return;
  }
  FUZZ_CHECK(!status, "%s", emx_last_error());
  FUZZ_CHECK(!emx_decode(w->ctx, w->kv, &batch, &select, &io, workspace, bytes), "%s", emx_last_error());
  for (int h = 0; h < H; h++) {
    const int g = h / (H / w->G);
    const emx_report *r = &reports[h];
    bool read[LENGTH / 16] = {0}, odd = false;
    for (int32_t i = 0; i < n_pages[h]; i++) read[pages[h * (LENGTH / 16) + i]] = true;
    double top = -INFINITY, size = 1;
    for (int64_t j = 0; j < m->n; j++) {
      double dot = 0;
      bool finite = true;
      for (int d = 0; d < w->D; d++) {
        const double k = stored(m->ids[j], 0, g, d, w->dtype);
        finite &= isfinite(k) != 0;
        dot += (double)q[h * w->D + d] * k;
      }
      s[j] = dot * (double)(1.0f / sqrtf((float)w->D)) + (double)slopes[h] * (double)(j - m->n + 1);
      if (!finite) {
        FUZZ_CHECK(read[j / w->P], "the non-finite token %d was not read", (int)j);
        odd |= s[j] != -INFINITY;
      } else {
        size = fmax(size, fabs(s[j]));
      }
    }
    if (odd) {
      FUZZ_CHECK(r->flags == EMX_REPORT_NONFINITE && isnan(o[h * w->D]), "a NaN that nobody sees");
      continue;
    }
    FUZZ_CHECK(!(r->flags & EMX_REPORT_NONFINITE), "finite data, flags %d", r->flags);
    int64_t support;
    emxi_oracle_entmax(s, m->n, alpha, p, &support);
    double dropped = 0;
    for (int64_t j = 0; j < m->n; j++)
      if (!read[j / w->P]) {
        dropped += p[j];
        top = fmax(top, s[j]);
      }
    FUZZ_CHECK((double)r->delta_bound >= dropped * (1 - 1e-9) - 1e-12, "delta_bound %g, truth %g", r->delta_bound, dropped);
    FUZZ_CHECK((double)r->max_unread >= (alpha == 1 ? 1 : alpha - 1) * top, "max_unread %g, truth %g", r->max_unread, top);
    if (!(r->flags & EMX_REPORT_CERTIFIED)) continue;
    FUZZ_CHECK(dropped <= 1e-12, "certified, but %g was dropped", dropped);
    for (int d = 0; d < w->D; d++) {
      double want = 0;
      for (int64_t j = 0; j < m->n; j++)
        if (p[j] > 0) want += p[j] * stored(m->ids[j], 1, g, d, w->dtype);
      FUZZ_CHECK(fabs((double)o[h * w->D + d] - want) <= 4e-4 * size, "o %g, oracle %g", o[h * w->D + d], want);
    }
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static world w;
  static emx_ctx *ctx;
  if (!ctx) {
    emx_ctx_opts opts;
    emx_ctx_opts_init(&opts);
    opts.threads = 1;
    FUZZ_CHECK(!emx_ctx_create(&opts, &ctx), "%s", emx_last_error());
  }
  static const int32_t dtypes[] = {EMX_F32, EMX_F16, EMX_BF16}, dims[] = {16, 24, 40};
  fuzz_input in = {data, size};
  memset(&w, 0, sizeof w);
  w.ctx = ctx;
  w.dtype = dtypes[fuzz_u8(&in) % 3];
  w.G = 1 + fuzz_u8(&in) % MAX_G;
  w.D = dims[fuzz_u8(&in) % 3];
  w.P = 16 << fuzz_u8(&in) % 3;
  w.layout = fuzz_u8(&in) % 2;
  const uint8_t extras = fuzz_u8(&in);
  w.summaries = extras % 4;
  w.in_file = extras & 4;
  char file[64];
  snprintf(file, sizeof file, "/tmp/emx_fuzz_kv.%ld", (long)getpid());
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.dtype = w.dtype;
  o.kv_heads = w.G;
  o.head_dim = w.D;
  o.page_size = w.P;
  o.layout = w.layout;
  o.summaries = w.summaries;
  o.max_seqs = SEQS;
  o.max_pages = PAGES;
  o.file = w.in_file ? file : NULL;
  FUZZ_CHECK(!emx_kv_create(ctx, &o, &w.kv), "%s", emx_last_error());
  for (int op = 0; op < OPS && in.left; op++) {
    const uint8_t code = fuzz_u8(&in);
    int32_t s = -1, from = fuzz_u8(&in) % SEQS;
    model *m = &w.seq[from];
    emx_status status;
    switch (code % 8) {
      case 0:
        status = emx_seq_create(w.kv, &s);
        FUZZ_CHECK(!status || status == EMX_ERR_STATE, "%s", emx_last_error());
        if (!status) w.seq[s].used = true, w.seq[s].n = 0;
        break;
      case 1:
        status = emx_seq_fork(w.kv, from, &s);
        FUZZ_CHECK(!status || status == EMX_ERR_STATE, "%s", emx_last_error());
        if (!status) w.seq[s] = *m;
        break;
      case 2: {
        const int64_t to = m->used ? fuzz_u16(&in) % (m->n + 1) : 0;
        status = emx_seq_truncate(w.kv, from, to);
        FUZZ_CHECK(m->used ? !status : status == EMX_ERR_STATE, "%s", emx_last_error());
        m->n = to;
        break;
      }
      case 3:
        if (code % 3) break; /* rarer than the others */
        status = emx_seq_destroy(w.kv, from);
        FUZZ_CHECK(m->used ? !status : status == EMX_ERR_STATE, "%s", emx_last_error());
        m->used = false;
        break;
      case 4:
      case 5: append(&w, &in); break;
      default: decode(&w, &in);
    }
    check_contents(&w);
  }
  emx_kv_destroy(w.kv);
  return 0;
}
