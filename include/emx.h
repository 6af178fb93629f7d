/* SPDX-License-Identifier: Apache-2.0
 *
 * libentmax: attention whose weights are exactly zero for irrelevant tokens (alpha-entmax), with a sparse decode that says
 * whether it lost anything.
 *
 *     p_i = [(alpha-1) s_i - tau]_+ ^ (1/(alpha-1)),   tau such that sum_i p_i = 1          (alpha = 1: softmax)
 *
 * Shape letters, everywhere:  B batch, H query heads, G key/value heads (H a multiple of G; query head h reads KV head
 * h / (H/G)), S query tokens, N keys, D head dimension, P page size, M pages, R rows.
 *
 * Conventions that hold for every function here:
 *   - emx_status is 0 or negative; results go through out-pointers that stay untouched on failure; emx_last_error() has a
 *     sentence of detail for the calling thread. The library never prints, exits or aborts, and never falls back silently.
 *   - Option and argument structs begin with struct_size; _init (which passes the caller's sizeof to _init_sized) fills in the
 *     size and the defaults; fields are only ever appended, and zero in an appended field means what held before it. A shorter
 *     struct of an older header counts as one with zeros behind it; a longer one of a newer header is UNSUPPORTED where it has
 *     more than zeros there. Structs that a function fills need struct_size set first, nothing else; they get the fields that
 *     they have room for. An option struct may also be written out, {.struct_size = sizeof opts, ...}: what is left out is zero
 *     then, also where the comment at _init names another default.
 *   - Tensors are borrowed strided views with a contiguous last dimension. Sizes are size_t, counts int64_t.
 *   - No function allocates unless its name ends in _create, or its comment says so. Working memory is the caller's:
 *     ask for the size, pass a buffer (any alignment; slack to align it is included in the size).
 *   - tau is in units of (alpha-1) * score and is never a log-sum-exp. "score" is scale * (q.k) + ALiBi bias.
 *   - Infinities are data: a score of -inf is masked. A fully masked row gives zero output, support 0 and tau = -inf. A score of
 *     NaN or +inf, which is what a NaN or an infinity in q or in a key that is read makes unless the product is -inf, gives NaN
 *     for that row. A NaN in V of a token with weight zero does not leak.
 *   - Results do not depend on the number of threads, nor on the other rows of a batch.
 *   - Two threads that use one context are serialised. Handles made from a context are used with it and must not outlive it.
 *   - On a GPU a call checks its arguments, enqueues on the context's stream and returns. Structs, emx_tensors and host arrays
 *     are read before it returns; what the tensors point to, workspace and reports are device memory and must live until the
 *     stream has passed. Bad indices or lengths in device memory surface at emx_ctx_sync; "untouched on failure" is about
 *     failures that the call itself returns. A caller that sets the stream per call holds its own lock around the two calls.
 *   - A field that a later version appends has the old behaviour at zero. Reserved fields are zero.
 */
#ifndef EMX_H
#define EMX_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define EMX_API __attribute__((visibility("default")))
#else
#define EMX_API
#endif

#define EMX_VERSION_MAJOR 0
#define EMX_VERSION_MINOR 1
#define EMX_VERSION_PATCH 0
#define EMX_ABI_VERSION 1

/* "0.1.0", of the library that is loaded. */
EMX_API const char *emx_version(void);
/* EMX_ABI_VERSION of the library that is loaded; a binding compares it with the header it was written for. */
EMX_API int32_t emx_abi_version(void);

/* ------------------------------------------------------------------------------------------------------------- status */

typedef int32_t emx_status;
enum {
  EMX_OK = 0,
  EMX_ERR_INVALID = -1,     /* an argument has no meaning (NULL, negative size, alpha < 1, unknown enum) */
  EMX_ERR_SHAPE = -2,       /* shapes or strides contradict each other */
  EMX_ERR_DTYPE = -3,       /* dtype not accepted here, or dtypes that must agree do not */
  EMX_ERR_UNSUPPORTED = -4, /* meaningful, but this back end cannot do it; the detail names the nearest thing it can */
  EMX_ERR_NOMEM = -5,       /* out of memory; the detail has the number of bytes */
  EMX_ERR_WORKSPACE = -6,   /* the caller's buffer is smaller than the size that the size query gives */
  EMX_ERR_IO = -7,          /* the operating system refused to read or write */
  EMX_ERR_FORMAT = -8,      /* a file is not what it claims to be */
  EMX_ERR_DEVICE = -9,      /* the accelerator or its driver reported a fault */
  EMX_ERR_STATE = -10,      /* the handle is not in a state that allows this (unknown sequence, no free page) */
  EMX_ERR_CANCELLED = -11,  /* emx_ctx_cancel() was called */
  EMX_ERR_NONFINITE = -12,  /* training met a NaN or an infinity */
  EMX_ERR_INTERNAL = -13    /* a defect of this library */
};
/* Name of a status, "EMX_ERR_SHAPE"; "unknown status" for any other number. Never NULL. */
EMX_API const char *emx_status_name(emx_status status);
/* What went wrong in the last call of this thread that failed; "" if none did. Valid until the next failure. */
EMX_API const char *emx_last_error(void);

/* ------------------------------------------------------------------------------------------------------------ tensors */

enum { EMX_F32 = 1, EMX_F16 = 2, EMX_BF16 = 3, EMX_F64 = 4, EMX_I32 = 5, EMX_Q8 = 16 /* reserved for quantised K and V */ };
enum { EMX_DEVICE_CPU = 0, EMX_DEVICE_CUDA = 1 };
/* How 4-D attention tensors are laid out. BHND: [B,H,S,D] and pools [M,G,P,D]. BNHD: [B,S,H,D] and pools [M,P,G,D]. */
enum { EMX_LAYOUT_BHND = 0, EMX_LAYOUT_BNHD = 1 };

#define EMX_MAX_DIMS 5
/* A borrowed view. Strides count elements and must be positive for dimensions longer than 1; the last one must be 1. */
typedef struct emx_tensor {
  void *data;
  int32_t dtype;
  int32_t device;
  int32_t ndim;
  int32_t device_index; /* which GPU; must be the context's. 0 on the CPU */
  int64_t shape[EMX_MAX_DIMS];
  int64_t stride[EMX_MAX_DIMS];
} emx_tensor;

/* Bytes of one element, 0 for an unknown dtype. */
EMX_API size_t emx_dtype_size(int32_t dtype);
/* "f32", "bf16", ...; "unknown" otherwise. */
EMX_API const char *emx_dtype_name(int32_t dtype);
/* A CPU view of a C-contiguous array. ndim above EMX_MAX_DIMS gives a view that every function refuses. */
EMX_API emx_tensor emx_tensor_view(void *data, int32_t dtype, int32_t ndim, const int64_t *shape);

/* ------------------------------------------------------------------------------------------------------------ context */

typedef struct emx_ctx emx_ctx;

/* Runs task(arg, i, worker) for i = 0..n-1, each exactly once, and returns when all have ended. worker is in [0, threads) and no
 * two tasks run at the same time with the same worker. */
typedef void (*emx_task_fn)(void *arg, int64_t i, int32_t worker);
typedef void (*emx_parallel_for_fn)(void *user, int64_t n, emx_task_fn task, void *arg);

typedef struct emx_ctx_opts {
  uint32_t struct_size;
  int32_t device;                   /* EMX_DEVICE_*; default CPU */
  int32_t device_index;             /* which GPU; 0 */
  int32_t threads;                  /* workers; 0: EMX_THREADS from the environment, else the CPUs this process may run on */
  void *stream;                     /* cudaStream_t; NULL: the default stream. Ignored on the CPU */
  emx_parallel_for_fn parallel_for; /* NULL: own threads. Otherwise the caller's, and `threads` says how many workers it has */
  void *parallel_user;
} emx_ctx_opts;
EMX_API void emx_ctx_opts_init_sized(emx_ctx_opts *opts, size_t size);
#define emx_ctx_opts_init(opts) emx_ctx_opts_init_sized((opts), sizeof *(opts))

/* opts may be NULL for the defaults. Errors: INVALID, UNSUPPORTED (device not in this build, GPU older than compute capability
 * 8.0, unknown EMX_ISA), DEVICE (no driver or no GPU; the detail is CUDA's), NOMEM. In this version a context on a GPU has maps,
 * losses, attention (not f64; alpha to 2), caches with MINMAX, MOMENTS and SKETCH, emx_select and emx_decode with ALL, TOPK,
 * GAUSSIAN and PAGES, emx_decode with CERTIFIED, and the sessions of emx_model.h; training is UNSUPPORTED there. Summaries there
 * are of complete pages, centres and spreads a byte each. */
EMX_API emx_status emx_ctx_create(const emx_ctx_opts *opts, emx_ctx **out);
EMX_API void emx_ctx_destroy(emx_ctx *ctx); /* NULL is allowed */

typedef struct emx_ctx_info {
  uint32_t struct_size;
  int32_t device;
  int32_t threads;
  int32_t reserved;
  char isa[32];          /* CPU: "scalar", "avx2", "avx512": the kernel table in use */
  char device_name[128]; /* CPU model or GPU name */
} emx_ctx_info;
/* Set info->struct_size first. */
EMX_API emx_status emx_ctx_get_info(emx_ctx *ctx, emx_ctx_info *info);
/* Waits for the context's work and returns its first asynchronous fault. On the CPU nothing is asynchronous. */
EMX_API emx_status emx_ctx_sync(emx_ctx *ctx);
EMX_API emx_status emx_ctx_set_stream(emx_ctx *ctx, void *stream);
/* Makes running and later calls on this context return EMX_ERR_CANCELLED between two tiles, until emx_ctx_resume. Safe to call
 * from a signal handler and from other threads. Outputs of a cancelled call are undefined; caches stay consistent. */
EMX_API void emx_ctx_cancel(emx_ctx *ctx);
EMX_API void emx_ctx_resume(emx_ctx *ctx);

/* ------------------------------------------------------------------------------------------------------------ mapping */

/* Which map of a row of scores x to weights p; a = alpha - 1, b = 1/a. All are shift invariant, with exact zeros for alpha > 1.
 *
 *   ENTMAX    the p of the simplex that maximises p.x + H(p), H the Tsallis entropy of order alpha: p_i = [a x_i - tau]_+^b,
 *             sum p = 1 (Peters, Niculae, Martins 2019, eq. 10). alpha = 1: softmax; 2: sparsemax.
 *   NORMMAX   the p of the simplex that maximises p.x - |p|_alpha: p = w / sum w, w_i = [x_i - tau]_+^b, sum w^alpha = 1 (norm
 *             entropies: Blondel, Martins, Niculae 2020; Santos, Niculae, McNamee, Martins 2024 for Hopfield networks).
 *             1 < alpha <= 1000: a large alpha gives nearly equal weights on a support, alpha near 1 the largest scores alone.
 *   BUDGET    as ENTMAX, but at most one a weight and `budget` in all: p_i = min(1, [a x_i - tau]_+^b), sum p = budget. alpha = 2
 *             is the k-subsets relaxation (budget_bisect of the entmax package; upper bounds: Malaviya, Ferreira, Martins 2018).
 *             1 < alpha <= 4. A row with fewer unmasked scores than the budget gives each of them weight 1. */
enum { EMX_MAP_ENTMAX = 0, EMX_MAP_NORMMAX = 1, EMX_MAP_BUDGET = 2 };

typedef struct emx_entmax_desc {
  uint32_t struct_size;
  int32_t kind;  /* EMX_MAP_* */
  double alpha;  /* ENTMAX: 1 (softmax), or 1 + 1e-6 to 4. NORMMAX: 1 + 1e-6 to 1000. BUDGET: 1 + 1e-6 to 4 */
  double budget; /* BUDGET: sum of a row's weights, 0 < budget <= N; default 1. Others: not looked at */
} emx_entmax_desc;
EMX_API void emx_entmax_desc_init_sized(emx_entmax_desc *desc, size_t size); /* entmax, alpha = 1.5 */
#define emx_entmax_desc_init(desc) emx_entmax_desc_init_sized((desc), sizeof *(desc))

/* The tensors of one call. Optional ones are NULL. R or N may be 0. */
typedef struct emx_entmax_io {
  uint32_t struct_size;
  uint32_t reserved;
  const emx_tensor *x;       /* forward: [R,N] f32, f16, bf16 or f64 */
  const emx_tensor *p;       /* [R,N], dtype of x. Forward: output, may be x itself. Backward: the weights, input */
  const emx_tensor *tau;     /* forward, optional: output [R] f32 or f64; NaN at alpha = 1, no threshold. NORMMAX: of the score */
  const emx_tensor *support; /* forward, optional: output [R] i32, how many weights are not zero before they are rounded */
  const emx_tensor *dp;      /* backward: gradient of p, [R,N], dtype of p */
  const emx_tensor *dx;      /* backward: output [R,N], dtype of p; may be dp */
  const emx_tensor *alpha;   /* optional: [R] f32 or f64, one alpha a row instead of desc->alpha, with the same limits */
  const emx_tensor *d_alpha; /* backward, optional, ENTMAX only: output [R] f32 or f64, gradient of each row's alpha */
  const emx_tensor *budget;  /* forward, optional, BUDGET only: [R] f32 or f64, one budget a row instead of desc->budget */
} emx_entmax_io;
EMX_API void emx_entmax_io_init_sized(emx_entmax_io *io, size_t size);
#define emx_entmax_io_init(io) emx_entmax_io_init_sized((io), sizeof *(io))

/* Rows of weights. f32 and f64 rows of any length are within 1e-6 of the exact map and sum to one (BUDGET: to the budget) within
 * 1e-6 of it, for alpha > 2 up to what an element on the threshold costs (docs/math.md, 2); f16 and bf16 weights are those,
 * rounded. A row is read once (softmax: twice); what follows touches only scores that lie within 1/(alpha-1) of the largest
 * (NORMMAX: 1; BUDGET: of the budget-th largest). Errors: INVALID (an alpha or a budget out of range, by row), SHAPE, DTYPE,
 * UNSUPPORTED, CANCELLED. Working memory: one row a worker, kept by the context, which grows on the first call with a longer row
 * (the one allocation; NOMEM). On a GPU there is none, rows that fit the shared memory of 8 processors (440,000 in f32) are read
 * once, longer ones for each pass. An alpha, a budget or a target in device memory that is out of range makes its row NaN, and
 * the first one surfaces at emx_ctx_sync. */
EMX_API emx_status emx_entmax_forward(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_entmax_io *io);

/* dx = J^T dp from the weights alone; u_i = p_i^(2-alpha) on the support (docs/math.md, 6).
 *   ENTMAX    J = diag(u) - u u^T / sum(u)  (Peters et al. 2019, prop. 2; alpha = 1: u = p)
 *   NORMMAX   J = |p|_alpha^a / a (diag(u) - u p^T - p u^T + sum(u) p p^T)
 *   BUDGET    as ENTMAX over the weights strictly between 0 and 1
 * d_alpha = dp . dp/dalpha (Correia, Niculae, Martins 2019, prop. 1, in a form that holds down to softmax; at alpha = 1 it is the
 * derivative from the right, sum dp_i p_i (sum_j p_j ln^2 p_j - ln^2 p_i) / 2).
 * For alpha > 2 u grows without bound as p goes to 0, and so does the true gradient between two such elements. Weights under
 * 2^(-52/(alpha-1)) (NORMMAX: times |p|_alpha), which no solver in double can tell from zero or from each other, count as that
 * much: gradients stay finite.
 * A dp at a weight of zero is not read. A fully masked row (all p zero) gives zeros, NaN weights give NaN.
 * Errors: as forward; UNSUPPORTED for d_alpha of another kind than ENTMAX. */
EMX_API emx_status emx_entmax_backward(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_entmax_io *io);

/* What io->total is, and what io->d_loss is the gradient of. MEAN divides by the number of rows that are not ignored (as the
 * entmax package and PyTorch do: NaN if there is none). */
enum { EMX_REDUCE_NONE = 0, EMX_REDUCE_SUM = 1, EMX_REDUCE_MEAN = 2 };

/* The tensors of one loss. Optional ones are NULL. R may be 0; V may be 0 if every row is ignored. */
typedef struct emx_loss_io {
  uint32_t struct_size;
  int32_t ignore_index; /* rows with this target: loss 0, gradient 0, scores not read. Default -100; it may be a class */
  int32_t reduction;    /* EMX_REDUCE_*; default NONE */
  int32_t reserved;
  const emx_tensor *x;       /* [R,V] scores, f32, f16, bf16 or f64 */
  const emx_tensor *target;  /* [R] i32, 0 <= target < V, or ignore_index */
  const emx_tensor *loss;    /* output [R] f32 or f64 */
  const emx_tensor *total;   /* optional: output [1] f32 or f64, sum or mean of the losses as they are stored; not with NONE */
  const emx_tensor *support; /* optional: output [R] i32, nonzeros of p; 0 for an ignored row */
  const emx_tensor *d_loss;  /* optional: f32 or f64, upstream gradient; NONE: of loss, [R]; SUM, MEAN: of total, [1]. NULL: 1 */
  const emx_tensor *dx;      /* optional: output [R,V], dtype of x; may be x. (p - e_target) times the upstream gradient */
} emx_loss_io;
EMX_API void emx_loss_io_init_sized(emx_loss_io *io, size_t size);
#define emx_loss_io_init(io) emx_loss_io_init_sized((io), sizeof *(io))

/* Fenchel-Young loss of each row and, in the same pass, its gradient (Blondel, Martins, Niculae 2020; Peters et al. 2019):
 *     loss = max_p (p.x + H(p)) - x_target,     dx = p - e_target,     p the map of x
 * ENTMAX: alpha = 1 cross-entropy (natural logarithm), 2 sparsemax loss (Martins, Astudillo 2016). NORMMAX: H(p) = 1 - |p|_alpha.
 * BUDGET: UNSUPPORTED. It is never negative, and exactly 0 where p = e_target: entmax reaches that at a margin of 1/(alpha-1).
 * Absolute error for f32 scores below 1e-6 (1 + |loss|); the terms are differences from the largest score, in double.
 * A target of score -inf costs +inf (dx stays p - e_target; zeros if the whole row is masked); a row with NaN or +inf gives NaN.
 * Errors: as the forward map; INVALID for a target that is no class (the detail names the row), before anything is written. */
EMX_API emx_status emx_entmax_loss(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_loss_io *io);

/* ---------------------------------------------------------------------------------------------------- dense attention */

enum { EMX_ATTN_CAUSAL = 1 }; /* query i of S sees keys 0 .. N-S+i (bottom-right aligned) */

typedef struct emx_attn_desc {
  uint32_t struct_size;
  uint32_t flags;       /* EMX_ATTN_* */
  double alpha;         /* 1, or 1 + 1e-6 to 4; backward: at most 2. Unused where the call has one alpha a head */
  float scale;          /* of q.k, before the (alpha-1) factor; 0: 1/sqrt(D) */
  int32_t layout;       /* EMX_LAYOUT_* of every 4-D tensor and of a paged pool */
  int32_t window_left;  /* keys before the query's own position i+N-S that it sees; -1: all */
  int32_t window_right; /* the same after it; -1: all. Causal: none */
} emx_attn_desc;
EMX_API void emx_attn_desc_init_sized(emx_attn_desc *desc, size_t size); /* alpha 1.5, causal, BHND, no window */
#define emx_attn_desc_init(desc) emx_attn_desc_init_sized((desc), sizeof *(desc))

/* The tensors of one attention call. Optional ones are NULL. k and v share one dtype (f32, f16, bf16 or f64); q has it too, or
 * f32 over 16-bit keys; o and each gradient have the dtype of what they belong to, or f32. Head dims 16..256 (f64: 1..256).
 *
 *   padded   q, o [B,H,S,D]; k, v [B,G,N,D] (in BNHD: [B,S,H,D], [B,N,G,D]); seqlens_q, seqlens_k [B] i32 optional: rows past a
 *            length are not read, outputs there are zero.
 *   packed   cu_seqlens_q, cu_seqlens_k [B+1] i32 set: q, o [T,H,D]; k, v [T',G,D]; sequence b is rows cu[b]..cu[b+1]-1;
 *            rows past cu[B] are left alone.
 *   paged    block_table [B,M] i32 set: k, v are pools [M',P,G,D] (BNHD) or [M',G,P,D] (BHND), any strides; logical page p of
 *            sequence b is block_table[b][p]; seqlens_k [B] is required. Forward only.
 * tau, lse: f32 (f64 for f64 input), support: i32; shape of q without D. alibi_slopes [H] f32: adds -slope * |i+N-S-j| to the
 * score, S and N being the sequence's own lengths, as for the causal mask. A size query reads shapes only: data pointers may be
 * NULL there. */
typedef struct emx_attn_io {
  uint32_t struct_size;
  uint32_t reserved;
  const emx_tensor *q, *k, *v;
  const emx_tensor *o;
  const emx_tensor *tau;     /* alpha > 1. Forward: optional output; backward: input */
  const emx_tensor *support; /* forward: optional output; backward: input beside support_index, else unused */
  const emx_tensor *alibi_slopes;
  const emx_tensor *block_table;
  const emx_tensor *seqlens_q, *seqlens_k;
  const emx_tensor *cu_seqlens_q, *cu_seqlens_k;
  const emx_tensor *d_o;             /* backward: gradient of o, shape of q */
  const emx_tensor *d_q, *d_k, *d_v; /* backward: outputs; d_k, d_v are compact, with G heads */
  const emx_tensor *lse;             /* alpha = 1, instead of tau: natural log-sum-exp of the row's scores */
  /* [H] f64, optional: each query head's alpha, instead of desc->alpha. The call has tau then, never lse; rows of a head whose
   * alpha is exactly 1 hold their log-sum-exp in it. */
  const emx_tensor *alphas;
  const emx_tensor *d_alpha; /* backward, optional, with `alphas`: output [H] f64, the gradient of each head's alpha */
  /* Support lists, optional, alpha > 1: i32, shape of q with any capacity C in the place of D. Forward writes the positions of a
   * row's support in ascending order, where there are at most C of them; `support` (required) says how many, the entries past
   * them are left alone. Backward reads both and scores only what is listed; rows with more than C, and rows whose list is no
   * list of visible positions in ascending order or does not give back the row's tau, are found again by a scan. The gradients
   * are bit for bit the same with and without lists; on a GPU, where scores are summed otherwise, but for rounding. */
  const emx_tensor *support_index;
} emx_attn_io;
EMX_API void emx_attn_io_init_sized(emx_attn_io *io, size_t size);
#define emx_attn_io_init(io) emx_attn_io_init_sized((io), sizeof *(io))

enum { EMX_PASS_FORWARD = 0, EMX_PASS_BACKWARD = 1 };
/* Depends on shapes only, never on the data. Errors as for the pass itself. */
EMX_API emx_status emx_attn_workspace_size(emx_ctx *ctx, const emx_attn_desc *desc, const emx_attn_io *io, int32_t pass,
                                           size_t *bytes);
/* o_i = sum_j p_ij v_j; one pass over the keys, exact tau (threshold of a subset is a lower bound: docs/math.md).
 * Cost: 2 D FLOP a visible pair, 2 D a nonzero. Errors: INVALID, SHAPE, DTYPE, UNSUPPORTED, WORKSPACE, CANCELLED. */
EMX_API emx_status emx_attn_forward(emx_ctx *ctx, const emx_attn_desc *desc, const emx_attn_io *io, void *workspace,
                                    size_t workspace_bytes);
/* Gradients from (q, k, v, tau or lse, d_o) alone; nothing else of the forward pass is needed (AdaSplash-2; docs/math.md).
 * 1 <= alpha <= 2 and contiguous or packed K and V, else UNSUPPORTED. Rows past a length get zero gradients. */
EMX_API emx_status emx_attn_backward(emx_ctx *ctx, const emx_attn_desc *desc, const emx_attn_io *io, void *workspace,
                                     size_t workspace_bytes);

/* ----------------------------------------------------------------------------------------------------- paged KV cache */

typedef struct emx_kv emx_kv; /* one layer's keys and values: a pool of pages, and sequences over them */

/* Page summaries, side arrays indexed by physical page and KV head. */
enum {
  EMX_SUMMARY_MINMAX = 1,  /* minimum and maximum of each coordinate, in the cache's dtype (2 D elements) */
  EMX_SUMMARY_MOMENTS = 2, /* mean and spread of each coordinate (2 D f32) and the radius of the page about its mean (f32) */
  EMX_SUMMARY_SKETCH = 4,  /* what CERTIFIED reads: centres and radii of 16 and 64 positions, 2+2-bit codes of every key (on a
                            * GPU: of 16 positions, 4-bit codes) */
  EMX_SUMMARY_RESIDUAL = 8 /* with SKETCH: 4 more bits a coordinate, which spare most reads of exact keys; not on a GPU */
};

enum { EMX_KV_MEMORY_DEVICE = 0, EMX_KV_MEMORY_HOST = 1 }; /* where K and V of a cache lie */

typedef struct emx_kv_opts {
  uint32_t struct_size;
  int32_t dtype;     /* EMX_F32, EMX_F16 or EMX_BF16 */
  int32_t kv_heads;  /* G */
  int32_t head_dim;  /* D, 16..256 */
  int32_t page_size; /* P: 16, 32 or 64 */
  int32_t layout;    /* EMX_LAYOUT_BNHD: page [P,G,D]; EMX_LAYOUT_BHND (default): page [G,P,D] */
  int32_t summaries; /* EMX_SUMMARY_* bits */
  int32_t max_seqs;  /* sequences that may exist at the same time; default 64 */
  int64_t max_pages; /* size of the pool */
  /* The caller's pool, or NULL for one of the library's: 4-D in `layout` order, any strides, page dimension = max_pages (K and V
   * may be interleaved in one allocation). It must outlive the cache. */
  const emx_tensor *k_pool, *v_pool;
  /* CPU: K and V go into this file, summaries and tables stay in memory. NULL (default): a pool in memory. The file is scratch:
   * it must not exist yet, loses its name as soon as it is made, and goes with the cache, or with the process however that ends;
   * so no two caches share one. It grows with the pages that are used. A forked process cannot use the cache. */
  const char *file;
  /* GPU: EMX_KV_MEMORY_HOST puts K and V into pinned host memory that the device reads and writes over the bus; summaries,
   * sketches and tables stay on the device. The answers are the same. CERTIFIED then reads the few keys and values that its
   * sketches leave, so a context may be several times as large as the device's memory; the other selectors stream. Creation pins
   * the whole pool: 0.4 s a GiB. INVALID with a caller's pool; on the CPU there is no difference. */
  int32_t kv_memory;
  int32_t reserved;
} emx_kv_opts;
EMX_API void emx_kv_opts_init_sized(emx_kv_opts *opts, size_t size); /* bf16, pages of 16, BHND, 64 sequences; the rest is zero */
#define emx_kv_opts_init(opts) emx_kv_opts_init_sized((opts), sizeof *(opts))

/* Bytes that emx_kv_create would take with these options on this context's device (the caller's pool not counted) and, for its
 * tables and lists and for K and V with EMX_KV_MEMORY_HOST, in host memory; on the CPU the two add up. A file is not counted.
 * Either pointer may be NULL. */
EMX_API emx_status emx_kv_memory_size(emx_ctx *ctx, const emx_kv_opts *opts, size_t *device_bytes, size_t *host_bytes);
/* Errors: INVALID, DTYPE, SHAPE, UNSUPPORTED, NOMEM (more than the machine has: refused before allocating, with the bytes), IO
 * (file).
 *
 * With a file, every call that reads or writes K or V may return IO, with the system's reason: an append or a load then has
 * changed nothing, and a decode has written no output and no report. Reads and writes are pread and pwrite through buffers of 256
 * keys a worker (ALL: of all heads, up to 1 MiB or one page) that belong to the cache or to the workspace; nothing is mapped.
 * CERTIFIED reads the keys and values that its sketches leave, the other selectors stream. The bits are those of a cache in
 * memory. */
EMX_API emx_status emx_kv_create(emx_ctx *ctx, const emx_kv_opts *opts, emx_kv **out);
EMX_API void emx_kv_destroy(emx_kv *kv);

typedef struct emx_kv_info {
  uint32_t struct_size;
  int32_t dtype, kv_heads, head_dim, page_size, layout, summaries, seqs;
  int64_t max_pages, free_pages;
  int64_t bytes_kv;      /* of the pool, or of the file once it is full */
  int64_t bytes_summary; /* of the side arrays */
} emx_kv_info;
EMX_API emx_status emx_kv_get_info(const emx_kv *kv, emx_kv_info *info); /* set info->struct_size first */
/* Views of the pool, 4-D in the cache's layout order: what emx_attn_forward takes with a block table. UNSUPPORTED with a file. */
EMX_API emx_status emx_kv_pool_view(const emx_kv *kv, emx_tensor *k, emx_tensor *v);

/* Sequences that the library manages: an id, a length and a block table. Pages are shared by reference count; a fork shares every
 * page of its parent, and a shared page that would be written to is copied first (copy-on-write). */
EMX_API emx_status emx_seq_create(emx_kv *kv, int32_t *seq);
EMX_API emx_status emx_seq_fork(emx_kv *kv, int32_t parent, int32_t *seq);
/* Keeps the first `length` tokens. A page that is cut into is open again: its summaries are rebuilt on the next append. */
EMX_API emx_status emx_seq_truncate(emx_kv *kv, int32_t seq, int64_t length);
EMX_API emx_status emx_seq_destroy(emx_kv *kv, int32_t seq);
EMX_API emx_status emx_seq_length(const emx_kv *kv, int32_t seq, int64_t *length);
/* The sequence's physical pages in logical order; valid until the sequence is changed. */
EMX_API emx_status emx_seq_block_table(const emx_kv *kv, int32_t seq, const int32_t **pages, int64_t *n);

/* A sequence's tokens into a new sequence of another cache (or of the same one), wherever the two live: on the CPU, in a file, on
 * a GPU. kv_heads and head_dim are the same; page size, layout and summaries are each cache's own, and the target makes its
 * summaries as an append does. K and V are the same bits; those of an f32 cache are rounded to nearest where the target is
 * narrower. Waits for both devices and takes up to 24 MiB of staging memory while it lasts. Errors: INVALID, SHAPE, DTYPE, STATE
 * (no such sequence, not enough free pages or sequences, the source was changed meanwhile), NOMEM, IO, DEVICE; the target is then
 * as it was. */
EMX_API emx_status emx_seq_copy(const emx_kv *from, int32_t seq, emx_kv *to, int32_t *copy);

/* Which sequences a call works on: either `seqs` (ids of the library's sequences), or the caller's own tables as FlashInfer has
 * them. The two must not be mixed on one cache: the library would hand out pages that the caller uses. Lengths are those before
 * an append in the same call (without one, the full lengths; vLLM's seq_lens count the new tokens); the caller advances its own
 * afterwards. Tables and lengths live on the context's device. Entries of the table past a sequence's pages are not looked at.
 * A caller that writes K into a page other than by emx_kv_append must call emx_kv_summarize on it before the next selection:
 * summaries are trusted where they describe as many tokens as the page holds. */
typedef struct emx_kv_batch {
  uint32_t struct_size;
  int32_t batch;                 /* B */
  const int32_t *seqs;           /* [B] distinct ids, host memory; or NULL */
  const emx_tensor *block_table; /* i32 [B,M] physical pages, -1 absent */
  const emx_tensor *seq_lens;    /* i32 [B] */
  int64_t max_len; /* with tables: bound of the lengths after the call, where a GPU's host cannot read them; 0: look */
} emx_kv_batch;
EMX_API void emx_kv_batch_init_sized(emx_kv_batch *batch, size_t size);
#define emx_kv_batch_init(batch) emx_kv_batch_init_sized((batch), sizeof *(batch))

/* Appends n_new[b] tokens (i32 [B]; NULL: all T of them) to sequence b; k_new, v_new [B,G,T,D] (BHND) or [B,T,G,D] (BNHD) in the
 * cache's layout order and dtype, or f32, which is rounded to nearest. Summaries of touched pages are brought up to date in O(D)
 * a token. Atomic: on failure (STATE: not enough free pages; the detail has the number) no sequence has changed. */
EMX_API emx_status emx_kv_append(emx_ctx *ctx, emx_kv *kv, const emx_kv_batch *batch, const emx_tensor *k_new,
                                 const emx_tensor *v_new, const emx_tensor *n_new);
/* Builds the summaries of the given physical pages (i32 [n]), each holding tokens[i] tokens (i32 [n]; NULL: all full; 0: unknown
 * from now on), for pages that somebody else wrote into a caller's pool. With SKETCH, list a sequence's pages in order: 64/P
 * complete ones next to each other, from a multiple of 64/P in the list on, share a sketch of their 64 positions (only speed
 * depends on it). */
EMX_API emx_status emx_kv_summarize(emx_ctx *ctx, emx_kv *kv, const emx_tensor *pages, const emx_tensor *tokens);

typedef struct emx_kv_summary {
  uint32_t struct_size;
  int32_t valid; /* 1: the summaries describe `tokens` tokens of this page */
  int32_t tokens;
  int32_t nonfinite;     /* 1: the page holds a NaN or an infinity in K and is always read */
  const void *min, *max; /* [D], cache dtype; NULL without EMX_SUMMARY_MINMAX */
  const float *mean;     /* [D]; NULL without EMX_SUMMARY_MOMENTS */
  const float *m2;       /* [D], sum of squared deviations from the mean: spread^2 = m2 / tokens */
  float radius;          /* >= the largest distance of a key to `mean`; set when the page is complete, else +inf */
  int32_t reserved;
} emx_kv_summary;
/* A look at one page's summaries for one KV head (tests, inspection). Set out->struct_size first. Pointers are valid until the
 * page changes. On a GPU they are copies in host memory, valid until the cache's next emx_kv_get_summary, and the call waits for
 * the stream; only complete pages are described, valid is 0 where one holds a NaN or an infinity, mean and spread are what their
 * 8-bit codes say (spread rounded up), and radius is about that mean. Errors: INVALID; on a GPU DEVICE. */
EMX_API emx_status emx_kv_get_summary(const emx_kv *kv, int32_t page, int32_t kv_head, emx_kv_summary *out);

/* ------------------------------------------------------------------------------------------------ selection and decode */

enum {
  EMX_SELECT_ALL = 0,      /* every token; K streamed once; exact */
  EMX_SELECT_TOPK = 1,     /* the pages with the best box bound, fixed token budget (EntmaxKV's first selector; Quest's score) */
  EMX_SELECT_GAUSSIAN = 2, /* threshold estimated from page means and spreads (EntmaxKV's second selector, eq. 19) */
  /* Exact without reading every key: tokens whose sound score bound lies below the threshold are left out. Needs
   * EMX_SUMMARY_SKETCH. alpha = 1: with max_delta, for no weight of softmax is zero; heads without it take ALL's path. On a GPU
   * heads with an alpha outside 1.05 to 2 take it, too, and so do those that share their reads; no page lists of it there. What
   * it reads on a GPU depends on timing, unless max_bytes or max_delta is set: support and certificate are always the same, but
   * tokens, bytes and max_unread of a report and the last bits of o and tau may differ from call to call. */
  EMX_SELECT_CERTIFIED = 3,
  EMX_SELECT_PAGES = 4 /* emx_decode only: the caller's page lists */
};
enum {
  EMX_TAU_EXACT = 0,     /* solve tau on what was selected */
  EMX_TAU_CORRECTED = 1, /* a few bracketed steps from the estimate (GAUSSIAN only) */
  EMX_TAU_FIXED = 2      /* the estimate as it is; weights need not sum to one, the report has their sum (GAUSSIAN only) */
};

typedef struct emx_select_desc {
  uint32_t struct_size;
  int32_t kind;      /* EMX_SELECT_* */
  int32_t tau_mode;  /* EMX_TAU_* */
  int32_t tau_steps; /* CORRECTED: steps; 0: 3 */
  int64_t budget;    /* TOPK: tokens per query row, in whole pages, the newest page included; at least one page */
  /* CERTIFIED: stop a row once bytes_k + bytes_v + bytes_meta reach this; 0: none. Not where it takes ALL's path. On a GPU keys
   * are chosen in four rounds, so the last round's values may exceed it. */
  int64_t max_bytes;
  double max_delta;    /* CERTIFIED: stop when delta_bound is at most this (looked at every few keys); 0: exact */
  float max_quantile;  /* GAUSSIAN: quantile of a page's maximum that is compared with the threshold; 0.995 */
  float safety_margin; /* GAUSSIAN: margin below the threshold, in units of the overall score spread; 0 */
  float excess_margin; /* GAUSSIAN: margin as a fraction of the threshold's excess over typical pages; 0.1 */
  int32_t reserved;
} emx_select_desc;
EMX_API void emx_select_desc_init_sized(emx_select_desc *desc, size_t size); /* ALL, max_quantile 0.995, excess_margin 0.1 */
#define emx_select_desc_init(desc) emx_select_desc_init_sized((desc), sizeof *(desc))

enum { EMX_STOP_DONE = 0, EMX_STOP_BUDGET = 1, EMX_STOP_BYTES = 2, EMX_STOP_DELTA = 3 };
enum { EMX_PATH_ALL = 0, EMX_PATH_PAGES = 1, EMX_PATH_LADDER = 2 };
enum {
  /* tau was solved exactly, nothing unread can have weight, no score was NaN or +inf. V is not looked at. */
  EMX_REPORT_CERTIFIED = 1,
  EMX_REPORT_NONFINITE = 2 /* a score was NaN or +inf: the output is NaN */
};

/* What one query row did: 64 bytes, written where the work runs. Bytes are counted in 64-byte lines. */
typedef struct emx_report {
  float tau; /* threshold used, (alpha-1) * score units; alpha = 1: NaN */
  /* Sound upper bound, rounded up, of the entmax (alpha = 1: softmax) mass of all tokens that were not read; 0 if certified. */
  float delta_bound;
  float mass; /* sum of the weights used: 1 up to rounding, except in EMX_TAU_FIXED and _CORRECTED */
  /* Upper bound, rounded up, of (alpha-1) * score (alpha = 1: of the score) over all unread tokens; -inf if all were read. */
  float max_unread;
  int32_t support;    /* tokens with a nonzero weight */
  int32_t tokens;     /* tokens whose key was read */
  int32_t pages;      /* pages read */
  uint8_t select;     /* EMX_SELECT_* asked for */
  uint8_t path;       /* EMX_PATH_* taken */
  uint8_t stopped_by; /* EMX_STOP_* */
  uint8_t flags;      /* EMX_REPORT_* */
  int64_t bytes_k;    /* keys read for this row (shared reads are counted for each row that shares them) */
  int64_t bytes_v;
  int64_t bytes_meta; /* summaries, and what the check of a page list reads, keys included */
  int64_t reserved;
} emx_report;

/* Tensors of a selection or a decode. S query tokens per sequence, the last of them at position length-1: row (b,h,s) sees keys
 * 0 .. length-S+s (length counts the appended tokens). In this version S = 1 unless the selector is ALL. */
typedef struct emx_decode_io {
  uint32_t struct_size;
  int32_t layout; /* of q, o, k_new, v_new: EMX_LAYOUT_BHND [B,H,S,D] or EMX_LAYOUT_BNHD [B,S,H,D] */
  double alpha;   /* 1 or 1 < alpha <= 4 (GAUSSIAN: > 1) */
  float scale;    /* 0: 1/sqrt(D) */
  int32_t reserved;
  const emx_tensor *q;             /* f32, f16 or bf16 */
  const emx_tensor *k_new, *v_new; /* emx_decode: S new tokens to append first, or NULL */
  const emx_tensor *o;             /* emx_decode: output, dtype of q or f32 */
  const emx_tensor *alibi_slopes;  /* [H] f32: score gets slope * (j - i) */
  /* Page lists, per row in BHND order: logical pages, ascending, unique. Outputs of emx_select; inputs of emx_decode with
   * PAGES. */
  const emx_tensor *pages;   /* [B,H,S,M] i32, -1 past the end */
  const emx_tensor *n_pages; /* [B,H,S] i32 */
  const emx_tensor *bound;   /* [B,H,S] f32, emx_select: see emx_report.max_unread */
  emx_report *reports;       /* row (b,h,s) at index (b*H + h)*S + s; NULL: none */
  int64_t report_stride;     /* bytes between reports; 0: 64 */
  const emx_tensor *alphas;  /* [H] f64, optional: each query head's alpha, instead of `alpha`; ranges as there */
  /* emx_decode, CPU only, the three together or none: which tokens made each row's output, with the weights that it used, for any
   * selector. support_count [B,H,S] i32: how many tokens the row has, its report's support. support_index i32 and support_weight
   * f32, [B,H,S,C] with any capacity C: the first min(count, C) of them, positions ascending; entries past those are left alone,
   * and those of a call that fails on the way (CANCELLED, IO) hold nothing. The weights of a whole list sum to the report's mass.
   * alpha = 1, where no weight is exactly zero: every token that was read and whose score is above -inf (CERTIFIED, where it
   * took the ladder: those with a weight that a float can tell from zero). That reads the keys once more, uncounted. */
  const emx_tensor *support_index, *support_weight, *support_count;
} emx_decode_io;
EMX_API void emx_decode_io_init_sized(emx_decode_io *io, size_t size); /* alpha 1.5 */
#define emx_decode_io_init(io) emx_decode_io_init_sized((io), sizeof *(io))

/* Working memory of emx_select and emx_decode for sequences of at most max_len tokens. */
EMX_API emx_status emx_decode_workspace_size(emx_ctx *ctx, const emx_kv *kv, const emx_select_desc *select,
                                             const emx_decode_io *io, int64_t max_len, size_t *bytes);
/* Page lists and the bound of what they leave out, nothing else. TOPK and GAUSSIAN need their summaries (else STATE). CERTIFIED:
 * the pages of all keys that emx_decode would read, hence all that hold a token with weight (every page, where it would take
 * ALL's path); a decode with that list has CERTIFIED's answer, and its report is certified where CERTIFIED's is. Not with a cache
 * in a file (UNSUPPORTED). */
EMX_API emx_status emx_select(emx_ctx *ctx, const emx_kv *kv, const emx_kv_batch *batch, const emx_select_desc *select,
                              const emx_decode_io *io, void *workspace, size_t workspace_bytes);
/* Appends (if k_new), selects, solves tau, accumulates, reports. V is read for the support only (alpha > 1).
 * Page lists from anyone go through the same certificate as the library's own: bounds from MINMAX if the cache has them, else
 * from MOMENTS, and where reports are wanted from SKETCH as well, down to single keys. That takes as long as a certificate is
 * possible for PAGES, and for TOPK and GAUSSIAN where it reads no more than the decode itself did. Without any summaries nothing
 * is known of unread pages and delta_bound is 1. An empty sequence gives zeros, support 0.
 * Errors: INVALID, SHAPE, DTYPE, UNSUPPORTED, STATE, WORKSPACE, CANCELLED, IO (file). A failed call has appended nothing. */
EMX_API emx_status emx_decode(emx_ctx *ctx, emx_kv *kv, const emx_kv_batch *batch, const emx_select_desc *select,
                              const emx_decode_io *io, void *workspace, size_t workspace_bytes);

#ifdef __cplusplus
}
#endif
#endif /* EMX_H */
