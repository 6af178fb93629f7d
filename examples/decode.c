#include <emx.h>
#include <stdio.h>
static float k[64000], v[64000], o[64], work[1 << 18]; /* 1000 tokens of 64 numbers; we ask for token 617 */
int main(void) {
  for (int i = 0; i < 64000; i++) k[i] = (float)(i % 7 - 3) * (i / 64 == 617 ? 3 : 0.1f), v[i] = (float)(i / 64);
  int64_t all[] = {1, 1, 1000, 64}, one[] = {1, 1, 1, 64}; /* batch, heads, tokens, head dimension */
  emx_tensor tk = emx_tensor_view(k, EMX_F32, 4, all), tv = emx_tensor_view(v, EMX_F32, 4, all);
  emx_tensor tq = emx_tensor_view(k + 617 * 64, EMX_F32, 4, one), to = emx_tensor_view(o, EMX_F32, 4, one);
  emx_ctx *ctx; emx_kv *kv; emx_report report; int32_t seq;
  emx_kv_opts opts = {.struct_size = sizeof opts, .dtype = EMX_F32, .kv_heads = 1, .head_dim = 64, .page_size = 16,
                      .max_pages = 64, .max_seqs = 1};
  emx_kv_batch batch = {.struct_size = sizeof batch, .batch = 1, .seqs = &seq};
  emx_select_desc select = {.struct_size = sizeof select, .kind = EMX_SELECT_ALL}; /* EMX_SELECT_TOPK and others read less */
  emx_decode_io io = {.struct_size = sizeof io, .alpha = 1.5, .q = &tq, .o = &to, .reports = &report};
  if (emx_ctx_create(NULL, &ctx) || emx_kv_create(ctx, &opts, &kv) || emx_seq_create(kv, &seq) ||
      emx_kv_append(ctx, kv, &batch, &tk, &tv, NULL) || emx_decode(ctx, kv, &batch, &select, &io, work, sizeof work))
    return puts(emx_last_error()), 1;
  printf("o[0] = %g from %d of 1000 tokens%s\n", o[0], report.support, report.flags & EMX_REPORT_CERTIFIED ? ", certified" : "");
  emx_kv_destroy(kv), emx_ctx_destroy(ctx);
}
