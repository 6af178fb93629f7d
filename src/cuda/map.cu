/* SPDX-License-Identifier: Apache-2.0
 * What calls of the row mapping share over all dtypes: the sum of the losses, and how much shared memory there is to be. */
#include "map.cuh"

namespace {

/* Sum or mean of the losses as they are stored, in an order that depends on the number of rows alone. */
__global__ __launch_bounds__(1024) void total_loss(const __grid_constant__ emxi_cuda_rows r) {
  __shared__ double scratch[32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < r.rows; i += blockDim.x)
    if (r.target[i] != r.ignore_index) sum += load_value(r.loss, r.loss_dtype, i);
  sum = block_sum(sum, scratch);
  if (r.mean) sum /= counted_rows(r, scratch); /* of none: NaN */
  if (threadIdx.x == 0) store_value(r.total, r.total_dtype, 0, sum);
}

} // namespace

extern "C" void emxi_cuda_rows_total(const emxi_cuda_rows *r, void *stream) {
  total_loss<<<1, 1024, 0, (cudaStream_t)stream>>>(*r);
}
extern "C" size_t emxi_cuda_rows_shared(int64_t slice, size_t element) {
  const size_t fixed = element == 8 ? sizeof(block_shared<double>) : sizeof(block_shared<float>);
  return (fixed + 15) / 16 * 16 + (slice ? (size_t)slice * element + 16 : 0);
}
extern "C" int emxi_cuda_rows_clusters(void) {
  cudaFuncAttributes a;
  if (!cudaFuncGetAttributes(&a, total_loss)) return a.ptxVersion >= 90;
  (void)cudaGetLastError();
  return 0;
}
