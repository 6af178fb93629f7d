/* SPDX-License-Identifier: Apache-2.0
 * The last field of every versioned struct as 0.1.0 has it. Never changed when fields are appended: a caller that was compiled
 * with that header is served by all later libraries. A new struct gets a line with its last field. */
#ifndef EMXI_LAYOUTS_H
#define EMXI_LAYOUTS_H

#define EMXI_LAST_emx_ctx_opts parallel_user
#define EMXI_LAST_emx_ctx_info device_name
#define EMXI_LAST_emx_entmax_desc budget
#define EMXI_LAST_emx_entmax_io d_alpha
#define EMXI_LAST_emx_loss_io dx
#define EMXI_LAST_emx_attn_desc window_right
#define EMXI_LAST_emx_attn_io support_index
#define EMXI_LAST_emx_kv_opts file
#define EMXI_LAST_emx_kv_info bytes_summary
#define EMXI_LAST_emx_kv_batch max_len
#define EMXI_LAST_emx_kv_summary reserved
#define EMXI_LAST_emx_select_desc reserved
#define EMXI_LAST_emx_decode_io alphas
#define EMXI_LAST_emx_model_config reserved
#define EMXI_LAST_emx_session_opts kv_file
#define EMXI_LAST_emx_session_support reports
#define EMXI_LAST_emx_session_stats seconds
#define EMXI_LAST_emx_cache_info model
#define EMXI_LAST_emx_sample_opts seed
#define EMXI_LAST_emx_task_desc p_write
#define EMXI_LAST_emx_task_info max_scored
#define EMXI_LAST_emx_task_score nats
#define EMXI_LAST_emx_train_opts seed
#define EMXI_LAST_emx_train_data task
#define EMXI_LAST_emx_train_stats lr

#endif
