/* SPDX-License-Identifier: Apache-2.0
 * The f32 layers of the model on the CPU, forward and backward. Row-major arrays without padding; m rows (tokens).
 *
 * Work is cut into tiles that depend on the shapes alone; a tile has one owner and a fixed order of summation, so every result
 * has the same bits for any number of threads. Matrix products are cblas_sgemm on one tile at a time, on the worker's own thread.
 * Outputs must not overlap inputs unless a comment allows it. Errors: CANCELLED, INVALID (a size beyond what CBLAS can count). */
#ifndef EMXI_NN_H
#define EMXI_NN_H

#include "base/base.h"

/* For functions of plain element-wise loops: compiled for AVX2 as well. Contraction is off, so both clones give the same bits.
 * Sanitizers' run-times are not up yet when the loader resolves clones. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define EMXI_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define EMXI_CLONES
#endif
/* Before a loop whose elements depend on their own index alone, though arrays may be the same one. */
#if defined(__clang__)
#define EMXI_ELEMENTWISE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define EMXI_ELEMENTWISE _Pragma("GCC ivdep")
#else
#define EMXI_ELEMENTWISE
#endif

/* y [m,out] = (accumulate ? y : 0) + x [m,in] w^T, w [out,in]. */
emx_status emxi_linear(emx_ctx *ctx, const float *x, const float *w, float *y, int64_t m, int64_t in, int64_t out,
                       bool accumulate);
/* y = residual [m,out] + x w^T, in one pass over y. */
emx_status emxi_linear_residual(emx_ctx *ctx, const float *x, const float *w, const float *residual, float *y, int64_t m,
                                int64_t in, int64_t out);
/* dx [m,in] = (accumulate ? dx : 0) + dy [m,out] w. */
emx_status emxi_linear_dx(emx_ctx *ctx, const float *dy, const float *w, float *dx, int64_t m, int64_t in, int64_t out,
                          bool accumulate);
/* dw [out,in] = (accumulate ? dw : 0) + dy^T x. */
emx_status emxi_linear_dw(emx_ctx *ctx, const float *x, const float *dy, float *dw, float *partials, int64_t m, int64_t in,
                          int64_t out, bool accumulate);
/* Floats of its working memory: partial sums over m, where the matrix alone has too few tiles. Positive sizes. */
int64_t emxi_linear_partials(int64_t m, int64_t in, int64_t out);

/* y = x * rstd * w with rstd = 1/sqrt(mean(x^2) + eps) of each row; rstd: optional [m]. y may be x. */
emx_status emxi_rmsnorm(emx_ctx *ctx, const float *x, const float *w, double eps, float *y, float *rstd, int64_t m, int64_t d);
/* Floats of working memory that the backward pass needs: one partial dw for each tile of rows. */
int64_t emxi_rmsnorm_partials(int64_t m, int64_t d);
/* dx [m,d] (+)= the gradient of x, dw [d] += the gradient of w. dx may be dy unless it accumulates.
 * With h = x rstd, g = dy w:  dx = rstd (g - h mean(g h)),  dw = sum over rows of dy h. */
emx_status emxi_rmsnorm_backward(emx_ctx *ctx, const float *x, const float *w, const float *rstd, const float *dy, float *dx,
                                 float *dw, float *partials, int64_t m, int64_t d, bool accumulate);

/* out = silu(gate) * up, n elements; out may be gate or up. */
emx_status emxi_swiglu(emx_ctx *ctx, const float *gate, const float *up, float *out, int64_t n);
/* dgate, dup from dout, and out once more, which the forward pass then need not keep. Each may be gate, up or dout. */
emx_status emxi_swiglu_backward(emx_ctx *ctx, const float *gate, const float *up, const float *dout, float *dgate, float *dup,
                                float *out, int64_t n);

/* x [m,d] = rows of table; tokens must be valid. */
void emxi_embed(const float *table, const int32_t *tokens, float *x, int64_t m, int64_t d);
/* dtable [vocab,d] += rows of dx, in the order of the tokens. */
emx_status emxi_embed_backward(emx_ctx *ctx, const int32_t *tokens, const float *dx, float *dtable, int64_t m, int64_t d);

/* nll [m] = -ln softmax(logits [m,v])[target], targets in 0..v-1. grad_scale 0 leaves the logits alone; otherwise they become
 * grad_scale * (softmax - onehot). NaN or +inf among a row's logits gives a NaN. */
emx_status emxi_cross_entropy(emx_ctx *ctx, float *logits, const int32_t *targets, float *nll, float grad_scale, int64_t m,
                              int64_t v);

#endif
