#include <emx.h>
#include <stdio.h>

static float k[64000], v[64000], q[64], o[64]; /* 1000 cached tokens of 64 numbers, one head */
static char work[1 << 20];

int main(void) {
  for (int i = 0; i < 64000; i++) k[i] = (float)(i % 7 - 3) * (i / 64 == 617 ? 3 : 0.1f), v[i] = (float)(i / 64);
  for (int i = 0; i < 64; i++) q[i] = k[617 * 64 + i]; /* asks for token 617, whose value is 617 */
  emx_tensor tk = emx_tensor_view(k, EMX_F32, 4, (int64_t[]){1, 1, 1000, 64}), tv = tk;
  emx_tensor tq = emx_tensor_view(q, EMX_F32, 4, (int64_t[]){1, 1, 1, 64}), to = tq;
  emx_ctx *ctx;
  emx_kv *kv;
  emx_kv_opts opts;
  emx_kv_opts_init(&opts);
  opts.dtype = EMX_F32, opts.kv_heads = 1, opts.head_dim = 64, opts.page_size = 16, opts.max_pages = 64;
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  emx_select_desc select; /* every token; EMX_SELECT_TOPK and others read less */
  emx_select_desc_init(&select);
  emx_decode_io io; /* alpha = 1.5 */
  emx_decode_io_init(&io);
  emx_report report;
  int32_t seq;
  tv.data = v, to.data = o, io.q = &tq, io.o = &to, io.reports = &report, batch.batch = 1, batch.seqs = &seq;
  if (emx_ctx_create(NULL, &ctx) || emx_kv_create(ctx, &opts, &kv) || emx_seq_create(kv, &seq) ||
      emx_kv_append(ctx, kv, &batch, &tk, &tv, NULL) || emx_decode(ctx, kv, &batch, &select, &io, work, sizeof work))
    return puts(emx_last_error()), 1;
  printf("o[0] = %g from %d of %d tokens%s\n", o[0], report.support, report.tokens,
         report.flags & EMX_REPORT_CERTIFIED ? ", certified" : "");
  emx_kv_destroy(kv), emx_ctx_destroy(ctx);
}
