#include <emx.h>
#include <stdio.h>

enum { N = 1000, D = 64 }; /* cached tokens, head dimension; one query head, one KV head */

int main(void) {
  static float k[N * D], v[N * D], q[D], o[D];
  static char work[1 << 20];
  for (int i = 0; i < N * D; i++) k[i] = (float)(i % 7 - 3) * (i / D == 617 ? 3 : 0.1f), v[i] = (float)(i / D);
  for (int i = 0; i < D; i++) q[i] = k[617 * D + i]; /* asks for token 617 */

  emx_ctx *ctx;
  emx_kv *kv;
  emx_kv_opts opts;
  emx_kv_opts_init(&opts);
  opts.dtype = EMX_F32, opts.kv_heads = 1, opts.head_dim = D, opts.page_size = 16, opts.max_pages = 64;
  int32_t seq;
  if (emx_ctx_create(NULL, &ctx) || emx_kv_create(ctx, &opts, &kv) || emx_seq_create(kv, &seq)) return puts(emx_last_error()), 1;

  emx_tensor tk = emx_tensor_view(k, EMX_F32, 4, (int64_t[]){1, 1, N, D}), tv = emx_tensor_view(v, EMX_F32, 4, (int64_t[]){1, 1, N, D});
  emx_tensor tq = emx_tensor_view(q, EMX_F32, 4, (int64_t[]){1, 1, 1, D}), to = emx_tensor_view(o, EMX_F32, 4, (int64_t[]){1, 1, 1, D});
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1, batch.seqs = &seq;
  emx_select_desc select; /* every token; EMX_SELECT_TOPK and others read less */
  emx_select_desc_init(&select);
  emx_report report;
  emx_decode_io io;
  emx_decode_io_init(&io); /* alpha = 1.5 */
  io.q = &tq, io.o = &to, io.reports = &report;
  if (emx_kv_append(ctx, kv, &batch, &tk, &tv, NULL) || emx_decode(ctx, kv, &batch, &select, &io, work, sizeof work))
    return puts(emx_last_error()), 1;
  printf("o[0] = %g from %d of %d tokens, %s\n", o[0], report.support, report.tokens,
         report.flags & EMX_REPORT_CERTIFIED ? "certified" : "not certified");
  emx_kv_destroy(kv);
  emx_ctx_destroy(ctx);
}
