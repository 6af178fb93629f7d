/* SPDX-License-Identifier: Apache-2.0 */
#include "certified.cuh"

extern "C" void emxi_cuda_decode_f32(const emxi_cuda_decode *d, void *stream) { decode_all<float>(*d, (cudaStream_t)stream); }
