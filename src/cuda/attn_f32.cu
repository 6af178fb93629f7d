/* SPDX-License-Identifier: Apache-2.0 */
#include "attn_bwd.cuh"

extern "C" void emxi_cuda_attn_f32(const emxi_cuda_attn *a, void *stream) { attend<float>(*a, stream); }
