/* Shared by the fuzz targets: a cursor over the input, and a check that stays on in release builds. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define FUZZ_CHECK(cond, ...)                                    \
  do {                                                           \
    if (!(cond)) {                                               \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #cond); \
      fprintf(stderr, __VA_ARGS__);                              \
      fputc('\n', stderr);                                       \
      abort();                                                   \
    }                                                            \
  } while (0)

typedef struct fuzz_input {
  const uint8_t *data;
  size_t left;
} fuzz_input;

/* Zero past the end, so that every input is a complete program. */
static inline uint8_t fuzz_u8(fuzz_input *in) {
  if (!in->left) return 0;
  in->left--;
  return *in->data++;
}
static inline uint16_t fuzz_u16(fuzz_input *in) {
  uint16_t low = fuzz_u8(in);
  return (uint16_t)(low | (unsigned)fuzz_u8(in) << 8);
}
static inline uint32_t fuzz_u32(fuzz_input *in) {
  uint32_t low = fuzz_u16(in);
  return low | (uint32_t)fuzz_u16(in) << 16;
}

#endif
