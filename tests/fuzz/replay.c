/* Runs a fuzz target without libFuzzer: every file named, every file of a folder named, then generated inputs, always the same
 * ones. */
#include "fuzz.h"

#include <dirent.h>
#include <sys/stat.h>

static int replay_file(const char *path) {
  FILE *f = fopen(path, "rb");
  if (!f) {
    fprintf(stderr, "cannot read %s\n", path);
    return 1;
  }
  size_t size = 0, room = 1 << 16;
  uint8_t *data = malloc(room);
  while (data) {
    size += fread(data + size, 1, room - size, f);
    if (size < room) break;
    room *= 2;
    uint8_t *more = realloc(data, room);
    if (!more) free(data);
    data = more;
  }
  fclose(f);
  if (!data) return 1;
  /* A block of exactly this size, so that ASan sees a read past the end. */
  uint8_t *exact = malloc(size ? size : 1);
  if (exact) {
    memcpy(exact, data, size);
    LLVMFuzzerTestOneInput(exact, size);
  }
  free(exact);
  free(data);
  return !exact;
}

static int replay(const char *path, int *files) {
  struct stat st;
  if (stat(path, &st)) return 0; /* no corpus yet */
  if (!S_ISDIR(st.st_mode)) {
    ++*files;
    return replay_file(path);
  }
  DIR *dir = opendir(path);
  if (!dir) return 1;
  int bad = 0;
  for (struct dirent *e; (e = readdir(dir));) {
    char child[4096];
    if (e->d_name[0] == '.') continue;
    if (snprintf(child, sizeof child, "%s/%s", path, e->d_name) < (int)sizeof child) bad |= replay(child, files);
  }
  closedir(dir);
  return bad;
}

int main(int argc, char **argv) {
  int files = 0, bad = 0;
  for (int i = 1; i < argc; i++) bad |= replay(argv[i], &files);
  enum { INPUTS = 300, LONGEST = 1024 };
  uint32_t x = 2463534242u; /* xorshift32: any generator will do, the inputs only have to be the same everywhere */
  for (int i = 0; i < INPUTS; i++) {
    size_t size = (size_t)i * LONGEST / INPUTS;
    uint8_t *data = malloc(size ? size : 1);
    if (!data) return 1;
    for (size_t j = 0; j < size; j++) {
      x ^= x << 13;
      x ^= x >> 17;
      x ^= x << 5;
      data[j] = (uint8_t)(x >> 11);
      if (i % 3 == 0) data[j] &= 15; /* small numbers reach further into length fields and op codes */
    }
    LLVMFuzzerTestOneInput(data, size);
    free(data);
  }
  printf("%d files, %d generated inputs\n", files, INPUTS);
  return bad;
}
