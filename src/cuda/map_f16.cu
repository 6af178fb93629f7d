/* SPDX-License-Identifier: Apache-2.0 */
#include "map_launch.cuh"

extern "C" void emxi_cuda_rows_f16(const emxi_cuda_rows *r, void *stream) { rows_all<__half>(*r, (cudaStream_t)stream); }
