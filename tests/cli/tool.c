/* Makes and judges the files of the CLI tests.
 *   tool make FILE DTYPE T H G N D [nan]      q [T,H,D], k, v [N,G,D] of normals, and alibi_slopes [H]; nan: one key is NaN
 *   tool check FILE OUT ALPHA                 tensor o of OUT against float64 attention over FILE: prints the relative L2 error
 *   tool ruler MODEL TASK LENGTH I            sample I of eval --ruler with seed 1: prints choice, gain, margin and chance
 *   tool kl MODEL TEXT CTX N BUDGET           what eval --select topk says of the last N of CTX bytes: prints mean KL and top1 */
#include "base/base.h"
#include "base/num.h"
#include "entmax/entmax.h"
#include "train/ruler.h"

#include <emx_model.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(const char *what) {
  fprintf(stderr, "tool: %s: %s\n", what, emx_last_error());
  return 1;
}

static int make(int argc, char **argv) {
  if (argc < 9) return fail("make needs FILE DTYPE T H G N D");
  const int32_t dtype = !strcmp(argv[3], "f32") ? EMX_F32 : !strcmp(argv[3], "f16") ? EMX_F16 : EMX_BF16;
  const int64_t T = atoll(argv[4]), H = atoll(argv[5]), G = atoll(argv[6]), N = atoll(argv[7]), D = atoll(argv[8]);
  const int64_t shapes[3][3] = {{T, H, D}, {N, G, D}, {N, G, D}};
  static const char *const names[3] = {"q", "k", "v"};
  emx_named_tensor tensors[4];
  float slopes[64];
  for (int t = 0; t < 3; t++) {
    const int64_t n = shapes[t][0] * shapes[t][1] * shapes[t][2];
    float *x = malloc((size_t)n * sizeof *x);
    void *data = malloc((size_t)n * 4);
    if (!x || !data) return fail("memory");
    emxi_normals(42, (uint64_t)t, x, n);
    for (int64_t i = 0; i < n; i++) emxi_store(data, dtype, i, x[i]);
    if (t == 1 && argc > 9) emxi_store(data, dtype, 3, NAN);
    tensors[t] = (emx_named_tensor){names[t], emx_tensor_view(data, dtype, 3, shapes[t])};
    free(x);
  }
  for (int h = 0; h < H && h < 64; h++) slopes[h] = h % 2 ? 0 : 1.0f / (float)(h + 2);
  tensors[3] = (emx_named_tensor){"alibi_slopes", emx_tensor_view(slopes, EMX_F32, 1, &H)};
  if (emx_checkpoint_write(argv[2], tensors, 4, NULL, 0)) return fail("write");
  for (int t = 0; t < 3; t++) free(tensors[t].tensor.data);
  return 0;
}

static int check(int argc, char **argv) {
  if (argc < 5) return fail("check needs FILE OUT ALPHA");
  emx_checkpoint *in, *out;
  emx_tensor q, k, v, s, o;
  if (emx_checkpoint_open(argv[2], &in) || emx_checkpoint_open(argv[3], &out)) return fail("open");
  if (emx_checkpoint_find(in, "q", &q) || emx_checkpoint_find(in, "k", &k) || emx_checkpoint_find(in, "v", &v) ||
      emx_checkpoint_find(in, "alibi_slopes", &s) || emx_checkpoint_find(out, "o", &o))
    return fail("find");
  const int64_t T = q.shape[0], H = q.shape[1], D = q.shape[2], N = k.shape[0], G = k.shape[1];
  if (o.ndim != 3 || o.shape[0] != T || o.shape[1] != H || o.shape[2] != D || o.dtype != EMX_F32) return fail("shape of o");
  double *score = malloc((size_t)N * sizeof *score), *p = malloc((size_t)N * sizeof *p), err = 0, ref = 0;
  if (!score || !p) return fail("memory");
  for (int64_t t = 0; t < T; t++)
    for (int64_t h = 0; h < H; h++) {
      const int64_t n = N - T + t + 1, g = h / (H / G);
      for (int64_t j = 0; j < n; j++) {
        double dot = 0;
        for (int64_t d = 0; d < D; d++)
          dot += emxi_load(q.data, q.dtype, (t * H + h) * D + d) * emxi_load(k.data, k.dtype, (j * G + g) * D + d);
        score[j] = dot / sqrt((double)D) + emxi_load(s.data, s.dtype, h) * (double)(j - (n - 1));
      }
      emxi_oracle_entmax(score, n, atof(argv[4]), p, NULL);
      for (int64_t d = 0; d < D; d++) {
        double want = 0;
        for (int64_t j = 0; j < n; j++) want += p[j] * emxi_load(v.data, v.dtype, (j * G + g) * D + d);
        err += pow(emxi_load(o.data, EMX_F32, (t * H + h) * D + d) - want, 2);
        ref += want * want;
      }
    }
  printf("%.3e\n", sqrt(err / ref));
  free(score);
  free(p);
  emx_checkpoint_close(in);
  emx_checkpoint_close(out);
  return 0;
}

/* Two whole sessions, no forks; probabilities written out in float64. */
static int kl(int argc, char **argv) {
  enum { MOST = 4096 };
  if (argc < 7) return fail("kl needs MODEL TEXT CTX N BUDGET");
  const int ctx = atoi(argv[4]), n = atoi(argv[5]);
  static unsigned char text[MOST];
  int32_t tokens[MOST];
  FILE *f = fopen(argv[3], "rb");
  if (!f || ctx > MOST || fread(text, 1, (size_t)ctx, f) != (size_t)ctx) return fail("read");
  fclose(f);
  for (int i = 0; i < ctx; i++) tokens[i] = text[i];
  emx_ctx *c;
  emx_model *m;
  emx_session *s[2];
  emx_session_opts o;
  emx_session_opts_init(&o);
  if (emx_ctx_create(NULL, &c) || emx_model_open(c, argv[2], &m)) return fail("open");
  for (int i = 0; i < 2; i++) {
    emx_select_desc select;
    emx_select_desc_init(&select);
    select.kind = i ? EMX_SELECT_TOPK : EMX_SELECT_ALL;
    select.budget = atoi(argv[6]);
    if (emx_session_create(m, &o, &s[i]) || emx_session_set_select(s[i], &select) ||
        emx_session_prefill(s[i], tokens, ctx - n, NULL, NULL, NULL, NULL))
      return fail("session");
  }
  double total = 0, same = 0;
  for (int t = ctx - n; t < ctx; t++) {
    float logits[2][256];
    double p[2][256];
    int best[2] = {0, 0};
    for (int i = 0; i < 2; i++) {
      double sum = 0;
      if (emx_session_decode(s[i], tokens[t], logits[i])) return fail("decode");
      for (int v = 0; v < 256; v++) {
        sum += p[i][v] = exp((double)logits[i][v]); /* logits of a small model stay far from 700 */
        if (logits[i][v] > logits[i][best[i]]) best[i] = v;
      }
      for (int v = 0; v < 256; v++) p[i][v] /= sum;
    }
    for (int v = 0; v < 256; v++) total += p[0][v] * log(p[0][v] / p[1][v]);
    same += best[0] == best[1];
  }
  printf("%.9g %.9g\n", total / n, same / n);
  emx_session_destroy(s[0]);
  emx_session_destroy(s[1]);
  emx_model_close(m);
  emx_ctx_destroy(c);
  return 0;
}

/* ln p(text[from..n)) of a whole session's prefill, from its losses. */
static double log_p(emx_model *m, const char *text, int from, int n) {
  enum { MOST = 4096 };
  int32_t tokens[MOST];
  float nll[MOST];
  emx_session *s;
  double sum = 0;
  emx_session_opts o;
  emx_session_opts_init(&o);
  o.kv_dtype = EMX_F32;
  o.max_tokens = n;
  if (n > MOST || emx_session_create(m, &o, &s)) exit(fail("session"));
  for (int i = 0; i < n; i++) tokens[i] = (unsigned char)text[i];
  if (emx_session_prefill(s, tokens, n, nll, NULL, NULL, NULL)) exit(fail("prefill"));
  for (int i = from; i < n; i++) sum -= nll[i];
  emx_session_destroy(s);
  return sum;
}
/* Every choice in its full text, no forks, no decoding. */
static int ruler(int argc, char **argv) {
  if (argc < 6) return fail("ruler needs MODEL TASK LENGTH I");
  emxi_ruler_spec spec = {.length = atoi(argv[4]), .depth = -1, .seed = 1};
  while (strcmp(emxi_ruler_name(spec.task), argv[3])) spec.task++;
  emxi_ruler_sample q;
  emx_ctx *c;
  emx_model *m;
  if (emx_ctx_create(NULL, &c) || emx_model_open(c, argv[2], &m) || emxi_ruler_make(&spec, atoi(argv[5]), &q))
    return fail("open");
  char text[4096];
  double choice = 0, gain = 0, margin = 0, chance = 0;
  int n = (int)q.length;
  memcpy(text, q.prompt, (size_t)n);
  for (int a = 0; a < q.n_answers; a++) {
    const emxi_ruler_answer *x = &q.answers[a];
    double w[EMXI_RULER_CHOICES], g[EMXI_RULER_CHOICES], best_w = -INFINITY, best_g = -INFINITY;
    for (int i = 0; i < x->n_choices; i++) {
      memcpy(text + n, x->choices[i], EMXI_RULER_WORD);
      w[i] = log_p(m, text, n, n + EMXI_RULER_WORD);
      const int skip = (int)q.question;
      g[i] = w[i] - log_p(m, text + skip, n - skip, n - skip + EMXI_RULER_WORD);
      if (i != x->right) best_w = fmax(best_w, w[i]), best_g = fmax(best_g, g[i]);
    }
    choice += w[x->right] > best_w;
    gain += g[x->right] > best_g;
    margin += g[x->right] - best_g;
    chance += 1.0 / x->n_choices;
    memcpy(text + n, x->choices[x->right], EMXI_RULER_WORD);
    memcpy(text + n + EMXI_RULER_WORD, ", ", 2);
    n += EMXI_RULER_WORD + 2;
  }
  printf("%.9g %.9g %.9g %.9g\n", choice / q.n_answers, gain / q.n_answers, margin / q.n_answers, chance / q.n_answers);
  emxi_ruler_free(&q);
  emx_model_close(m);
  emx_ctx_destroy(c);
  return 0;
}

int main(int argc, char **argv) {
  if (argc > 1 && !strcmp(argv[1], "make")) return make(argc, argv);
  if (argc > 1 && !strcmp(argv[1], "check")) return check(argc, argv);
  if (argc > 1 && !strcmp(argv[1], "kl")) return kl(argc, argv);
  if (argc > 1 && !strcmp(argv[1], "ruler")) return ruler(argc, argv);
  return fail("unknown command");
}
