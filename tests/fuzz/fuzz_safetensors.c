/* Any bytes as a safetensors file: refused, or every tensor lies inside of the file and can be read from end to end.
 * The first byte chooses: even, the rest is the file as it is; odd, the rest is a header and its data, and the length is put in
 * front, so that generated inputs get past the first check. */
#include "base/num.h"
#include "fuzz/fuzz.h"
#include "model/model.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (!size) return 0;
  const int framed = data[0] & 1;
  data++;
  size--;
  uint8_t *bytes = malloc(size + 8);
  FUZZ_CHECK(bytes, "no memory");
  size_t n = 0;
  if (framed) { /* the header ends at the last brace */
    uint64_t header = 0;
    for (size_t i = 0; i < size; i++)
      if (data[i] == '}') header = i + 1;
    memcpy(bytes, &header, 8);
    n = 8;
  }
  if (size) memcpy(bytes + n, data, size);
  n += size;
  uint8_t *exact = malloc(n ? n : 1); /* ASan sees a read past the end */
  FUZZ_CHECK(exact, "no memory");
  memcpy(exact, bytes, n);
  free(bytes);

  emx_checkpoint *ck = NULL;
  emx_status status = emx_checkpoint_open_memory(exact, n, &ck);
  if (status) {
    FUZZ_CHECK(status == EMX_ERR_FORMAT, "status %d: %s", status, emx_last_error());
    FUZZ_CHECK(!ck && *emx_last_error(), "a failure without a sentence, or with a result");
  } else {
    unsigned sum = 0;
    size_t total = 0;
    for (int64_t i = 0; i < emx_checkpoint_count(ck); i++) {
      const char *name;
      emx_tensor t, found;
      FUZZ_CHECK(!emx_checkpoint_get(ck, i, &name, &t), "%s", emx_last_error());
      FUZZ_CHECK(!emx_checkpoint_find(ck, name, &found) && found.data == t.data, "%s is not found under its name", name);
      size_t bytes_of = emx_dtype_size(t.dtype);
      for (int d = 0; d < t.ndim; d++) bytes_of *= (size_t)t.shape[d];
      for (size_t b = 0; b < bytes_of; b++) sum += ((const uint8_t *)t.data)[b];
      total += bytes_of;
    }
    FUZZ_CHECK(total <= n && sum <= 255u * n, "more data than the file has");
    const char *note = emx_checkpoint_metadata(ck, "note");
    if (note) FUZZ_CHECK(strlen(note) <= n, "metadata longer than the file");
    emx_checkpoint_close(ck);
  }
  free(exact);
  return 0;
}
