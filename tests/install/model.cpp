// A user's C++ program on libentmax_model: both libraries are there, of one build, and share the error text of the thread.
#include <emx_model.h>

#include <cstring>
#include <iostream>
#include <memory>
#include <vector>

namespace {
struct close_context {
  void operator()(emx_ctx *ctx) const { emx_ctx_destroy(ctx); }
};
int failed(const char *what) {
  std::cerr << what << ": " << emx_last_error() << '\n';
  return 1;
}
}  // namespace

int main() {
  emx_ctx *raw = nullptr;
  if (emx_ctx_create(nullptr, &raw)) return failed("context");
  const std::unique_ptr<emx_ctx, close_context> ctx(raw);

  // The model library says no, and the core library has the sentence.
  emx_model *model = nullptr;
  if (emx_model_open(ctx.get(), "/nonexistent", &model) != EMX_ERR_IO) return failed("a folder that is not there");
  if (!std::strstr(emx_last_error(), "/nonexistent")) return failed("the sentence");

  const std::vector<float> logits = {0.0f, 2.0f, 1.0f};
  emx_sample_opts opts;
  emx_sample_opts_init(&opts);
  int32_t token = -1;
  if (emx_sample(logits.data(), 3, &opts, 0, &token) || token != 1) return failed("greedy sampling");

  // One optimiser step of the smallest model: jansson is not needed, the BLAS is.
  emx_model_config config;
  emx_model_config_init(&config);
  config.hidden_size = 32, config.intermediate_size = 32, config.num_layers = 1;
  config.num_heads = 1, config.num_kv_heads = 1, config.alibi_num_heads = 1;
  emx_train_opts train;
  emx_train_opts_init(&train);
  train.steps = 2, train.warmup = 1, train.length = 16, train.batch = 1;
  const std::vector<uint8_t> text(64, 'a');
  const uint8_t *files[] = {text.data()};
  const int64_t sizes[] = {static_cast<int64_t>(text.size())};
  emx_train_data data;
  emx_train_data_init(&data);
  data.n_files = 1, data.files = files, data.sizes = sizes;
  emx_trainer *trainer = nullptr;
  if (emx_trainer_create(ctx.get(), &config, &train, &data, &trainer)) return failed("trainer");
  emx_train_stats stats = {};
  stats.struct_size = sizeof stats;
  const bool ok = !emx_trainer_step(trainer, &stats) && stats.loss > 4 && stats.loss < 8;  // ln 256 = 5.5, untrained
  emx_trainer_destroy(trainer);
  if (!ok) return failed("a step of training");
  std::cout << "model: right\n";
}
