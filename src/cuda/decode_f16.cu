/* SPDX-License-Identifier: Apache-2.0 */
#include "certified.cuh"

extern "C" void emxi_cuda_decode_f16(const emxi_cuda_decode *d, void *stream) { decode_all<__half>(*d, (cudaStream_t)stream); }
