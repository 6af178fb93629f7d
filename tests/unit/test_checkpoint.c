/* safetensors: what is written comes back, what is malformed is refused with the right sentence, a failed write changes
 * nothing. */
#define _DEFAULT_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "model/model.h"

#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[] = "/tmp/emx_checkpoint_XXXXXX";
static char path[256];

static int setup(void **state) {
  (void)state;
  if (!mkdtemp(folder)) return 1;
  snprintf(path, sizeof path, "%s/x.safetensors", folder);
  return 0;
}
static int teardown(void **state) {
  (void)state;
  unlink(path);
  return rmdir(folder); /* fails if a test left a file behind, a temporary one for example */
}
static int files(void) {
  DIR *d = opendir(folder);
  assert_non_null(d);
  int n = 0;
  for (struct dirent *e; (e = readdir(d));) n += e->d_name[0] != '.';
  closedir(d);
  return n;
}

/* A file of this header and `data` bytes after it, in a block of exactly its size so that ASan sees a read past the end. */
static emx_status open_header(const char *header, size_t data, emx_checkpoint **ck) {
  uint64_t n = strlen(header);
  char *bytes = calloc(1, 8 + n + data + 1);
  assert_non_null(bytes);
  memcpy(bytes, &n, 8);
  memcpy(bytes + 8, header, n);
  char *exact = malloc(8 + n + data);
  assert_non_null(exact);
  memcpy(exact, bytes, 8 + n + data);
  free(bytes);
  emx_status status = emx_checkpoint_open_memory(exact, 8 + n + data, ck);
  if (!status) emx_checkpoint_close(*ck);
  free(exact);
  return status;
}
static void refuse(const char *header, size_t data, const char *sentence) {
  emx_checkpoint *ck = (emx_checkpoint *)&ck; /* stays as it is on failure */
  emx_status status = open_header(header, data, &ck);
  if (status != EMX_ERR_FORMAT) fail_msg("%s: %s", header, emx_status_name(status));
  if (!strstr(emx_last_error(), sentence)) fail_msg("%s: \"%s\" does not say \"%s\"", header, emx_last_error(), sentence);
  assert_ptr_equal(ck, &ck);
}
#define T(name, dtype, shape, begin, end) \
  "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end "]}"

static void test_round_trip(void **state) {
  (void)state;
  float a[6] = {1, -2, 3.5f, NAN, INFINITY, -0.f};
  uint16_t b[3] = {1, 2, 0xffff};
  double c = 1. / 3;
  int32_t d[4] = {-1, 0, INT32_MAX, INT32_MIN};
  emx_named_tensor t[] = {
      {"b", emx_tensor_view(b, EMX_BF16, 1, (int64_t[]){3})},  {"a", emx_tensor_view(a, EMX_F32, 2, (int64_t[]){2, 3})},
      {"c/\xc3\xa9\n", emx_tensor_view(&c, EMX_F64, 0, NULL)}, {"d", emx_tensor_view(d, EMX_I32, 3, (int64_t[]){2, 1, 2})},
      {"h", emx_tensor_view(b, EMX_F16, 1, (int64_t[]){1})},   {"empty", emx_tensor_view(NULL, EMX_F32, 2, (int64_t[]){5, 0})},
  };
  const char *const metadata[] = {"step", "12", "note", "\"quoted\" \xe2\x82\xac"};
  assert_int_equal(emx_checkpoint_write(path, t, 6, metadata, 2), EMX_OK);
  assert_int_equal(files(), 1);
  emx_checkpoint *ck;
  assert_int_equal(emx_checkpoint_open(path, &ck), EMX_OK);
  assert_int_equal(emx_checkpoint_count(ck), 6);
  assert_string_equal(emx_checkpoint_metadata(ck, "step"), "12");
  assert_string_equal(emx_checkpoint_metadata(ck, "note"), metadata[3]);
  assert_null(emx_checkpoint_metadata(ck, "none"));
  const char *before = NULL;
  for (int i = 0; i < 6; i++) {
    emx_tensor x;
    assert_int_equal(emx_checkpoint_find(ck, t[i].name, &x), EMX_OK);
    const emx_tensor *w = &t[i].tensor;
    assert_true(x.dtype == w->dtype && x.ndim == w->ndim);
    size_t bytes = emx_dtype_size(x.dtype);
    for (int k = 0; k < x.ndim; k++) {
      assert_true(x.shape[k] == w->shape[k] && x.stride[k] == w->stride[k]);
      bytes *= (size_t)x.shape[k];
    }
    if (bytes) assert_memory_equal(x.data, w->data, bytes);
    assert_int_equal((uintptr_t)x.data % emx_dtype_size(x.dtype), 0);
    /* file order: addresses ascend */
    const char *name;
    assert_int_equal(emx_checkpoint_get(ck, i, &name, &x), EMX_OK);
    assert_true(!before || (const char *)x.data >= before);
    if (!i) assert_int_equal((uintptr_t)x.data % 64, 0);
    before = x.data;
  }
  emx_tensor x;
  assert_int_equal(emx_checkpoint_find(ck, "none", &x), EMX_ERR_INVALID);
  assert_int_equal(emx_checkpoint_get(ck, 6, NULL, &x), EMX_ERR_INVALID);
  assert_int_equal(emx_checkpoint_get(ck, -1, NULL, &x), EMX_ERR_INVALID);
  emx_checkpoint_close(ck);
  emx_checkpoint_close(NULL);
}

static void test_accepts(void **state) {
  (void)state;
  emx_checkpoint *ck;
  assert_int_equal(open_header("{}", 0, &ck), EMX_OK);
  assert_int_equal(open_header("{} ", 0, &ck), EMX_OK);
  assert_int_equal(open_header("{\"__metadata__\":{}," T("a", "F32", "[1]", 0, 4) "}", 4, &ck), EMX_OK);
  /* The header's order is not the file's; empty tensors lie between others. */
  assert_int_equal(
      open_header("{" T("b", "F32", "[1]", 4, 8) "," T("e", "F64", "[0,9]", 4, 4) "," T("a", "F16", "[2]", 0, 4) "}", 8, &ck),
      EMX_OK);
}

static void test_bad_headers(void **state) {
  (void)state;
  refuse("", 0, "start with '{'");
  refuse("[]", 0, "start with '{'");
  refuse(" {}", 0, "start with '{'");
  refuse("{", 0, "header");
  refuse("{}x", 0, "header");
  refuse("{\"a\":}", 0, "header");
  refuse("{\"\xff\":1}", 0, "decode byte 0xff");
  refuse("{\"a\\u0000b\":{}}", 0, "header");
  refuse("{\"__metadata__\":[]}", 0, "__metadata__");
  refuse("{\"__metadata__\":{\"a\":1}}", 0, "__metadata__ a");
  refuse("{\"w\":[]}", 0, "tensor w: not an object");
  refuse("{\"w\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "dtype is missing");
  refuse("{\"w\":{\"dtype\":3,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "dtype is missing or not");
  refuse("{\"w\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "shape is missing");
  refuse("{\"w\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "data_offsets");
  refuse("{\"w\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", 4, "data_offsets");
  refuse("{\"w\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}}", 4, "data_offsets");
  refuse("{\"w\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4.0]}}", 4, "data_offsets");
  refuse("{" T("w", "F8_E4M3", "[4]", 0, 4) "}", 4, "tensor w: dtype F8_E4M3");
  refuse("{" T("w", "F32", "[-1]", 0, 4) "}", 4, "dimension 0");
  refuse("{" T("w", "F32", "[1.5]", 0, 4) "}", 4, "dimension 0");
  refuse("{" T("w", "F32", "[1,1,1,1,1,1]", 0, 4) "}", 4, "6 dimensions");
  refuse("{" T("w", "F32", "[4611686018427387904]", 0, 0) "}", 0, "overflows");
  refuse("{" T("w", "F32", "[4294967296,4294967296]", 0, 0) "}", 0, "overflows"); /* 2^64 * 4 wraps to 0 */
  refuse("{" T("w", "F32", "[0,9223372036854775807]", 0, 0) "}", 0, "overflows"); /* empty, but its strides are not */
  refuse("{" T("w", "F32", "[99999999999999999999]", 0, 4) "}", 4, "header");
  refuse("{" T("w", "F32", "[2]", 0, 4) "}", 4, "tensor w: 4 bytes, dtype and shape need 8");
  refuse("{" T("w", "F32", "[1]", 0, 8) "}", 8, "need 4");
  refuse("{" T("w", "F32", "[1]", -4, 0) "}", 4, "outside");
  refuse("{" T("w", "F32", "[1]", 4, 0) "}", 4, "outside");
  refuse("{" T("w", "F32", "[1]", 0, 4) "}", 3, "tensor w: bytes 0..4 are outside of the 3");
  refuse("{" T("w", "F32", "[1]", 0, 4) "," T("w", "F32", "[1]", 4, 8) "}", 8, "duplicate");
  refuse("{\"w\":{\"dtype\":\"F32\",\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "duplicate");
  refuse("{" T("a", "F32", "[2]", 0, 8) "," T("w", "F32", "[1]", 4, 8) "}", 8, "tensor w starts at byte 4 of the data, inside");
  refuse("{" T("a", "F32", "[1]", 0, 4) "," T("w", "F32", "[1]", 0, 4) "}", 4, "inside");
  refuse("{" T("a", "F32", "[1]", 0, 4) "," T("w", "F32", "[1]", 8, 12) "}", 12,
         "tensor w starts at byte 8 of the data, after a hole");
  refuse("{" T("w", "F32", "[1]", 4, 8) "}", 8, "after a hole");
  refuse("{" T("w", "F32", "[1]", 0, 4) "}", 5, "1 bytes after the last tensor");
  refuse("{}", 1, "after the last tensor");
  /* Whatever a name holds, a message holds no control characters. */
  refuse("{" T("\\u001b[31mw", "F32", "[2]", 0, 4) "}", 4, "tensor ?[31mw:");
}

static emx_status open_bytes(const void *data, size_t size) {
  emx_checkpoint *ck;
  FILE *f = fopen(path, "wb");
  assert_non_null(f);
  assert_int_equal(fwrite(data, 1, size, f), size);
  fclose(f);
  emx_status status = emx_checkpoint_open(path, &ck);
  if (!status) emx_checkpoint_close(ck);
  return status;
}

static void test_bad_files(void **state) {
  (void)state;
  emx_checkpoint *ck;
  char bytes[64] = {0};
  assert_int_equal(open_bytes(bytes, 0), EMX_ERR_FORMAT);
  assert_non_null(strstr(emx_last_error(), "empty"));
  for (size_t n = 1; n < 8; n++) assert_int_equal(open_bytes(bytes, n), EMX_ERR_FORMAT);
  assert_int_equal(open_bytes(bytes, 8), EMX_ERR_FORMAT);
  static const uint64_t lies[] = {3, 100 << 20, (100 << 20) + 1, INT64_MAX, UINT64_MAX, UINT64_MAX - 7};
  memcpy(bytes + 8, "{}", 2);
  for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
    memcpy(bytes, &lies[i], 8);
    assert_int_equal(open_bytes(bytes, 10), EMX_ERR_FORMAT);
    assert_non_null(strstr(emx_last_error(), i < 2 ? "truncated" : "at most"));
  }
  /* Cut anywhere, a good file is refused. */
  float w[4] = {1, 2, 3, 4};
  emx_named_tensor t = {"w", emx_tensor_view(w, EMX_F32, 1, (int64_t[]){4})};
  assert_int_equal(emx_checkpoint_write(path, &t, 1, NULL, 0), EMX_OK);
  char *good;
  size_t size;
  assert_int_equal(emxi_file_read(path, 4096, &good, &size), EMX_OK);
  assert_int_equal(open_bytes(good, size), EMX_OK);
  for (size_t n = 0; n < size; n++) assert_int_equal(open_bytes(good, n), EMX_ERR_FORMAT);
  emxi_free(good);
  assert_int_equal(emx_checkpoint_open(folder, &ck), EMX_ERR_IO);
  assert_non_null(strstr(emx_last_error(), "is a directory"));
  assert_int_equal(emx_checkpoint_open("/nonexistent/x", &ck), EMX_ERR_IO);
  assert_int_equal(emx_checkpoint_open("/dev/null", &ck), EMX_ERR_IO);
  assert_int_equal(emx_checkpoint_open(NULL, &ck), EMX_ERR_INVALID);
  assert_int_equal(emx_checkpoint_open_memory(NULL, 1, &ck), EMX_ERR_INVALID);
}

static void test_bad_writes(void **state) {
  (void)state;
  float w[4] = {1, 2, 3, 4};
  const emx_named_tensor good = {"w", emx_tensor_view(w, EMX_F32, 1, (int64_t[]){4})};
  assert_int_equal(emx_checkpoint_write(path, &good, 1, NULL, 0), EMX_OK);
  char *before, *after;
  size_t size, size_after;
  assert_int_equal(emxi_file_read(path, 4096, &before, &size), EMX_OK);

  emx_named_tensor t = good, two[2] = {good, good};
  assert_int_equal(emx_checkpoint_write(path, two, 2, NULL, 0), EMX_ERR_INVALID);
  assert_non_null(strstr(emx_last_error(), "two tensors are named w"));
  t.name = NULL;
  assert_int_equal(emx_checkpoint_write(path, &t, 1, NULL, 0), EMX_ERR_INVALID);
  t.name = "__metadata__";
  assert_int_equal(emx_checkpoint_write(path, &t, 1, NULL, 0), EMX_ERR_INVALID);
  t.name = "\xff";
  assert_int_equal(emx_checkpoint_write(path, &t, 1, NULL, 0), EMX_ERR_INVALID);
  t = good;
  t.tensor.dtype = EMX_Q8;
  assert_int_equal(emx_checkpoint_write(path, &t, 1, NULL, 0), EMX_ERR_DTYPE);
  t = good;
  t.tensor.stride[0] = 2;
  assert_int_equal(emx_checkpoint_write(path, &t, 1, NULL, 0), EMX_ERR_SHAPE);
  t = good;
  t.tensor.shape[0] = -4;
  assert_int_equal(emx_checkpoint_write(path, &t, 1, NULL, 0), EMX_ERR_SHAPE);
  t = good;
  t.tensor.ndim = -1;
  assert_int_equal(emx_checkpoint_write(path, &t, 1, NULL, 0), EMX_ERR_SHAPE);
  t = good;
  t.tensor.data = NULL;
  assert_int_equal(emx_checkpoint_write(path, &t, 1, NULL, 0), EMX_ERR_INVALID);
  static const char *const twice[] = {"a", "1", "a", "2"}, *const broken[] = {"a", "\xff"}, *const absent[] = {"a", NULL};
  assert_int_equal(emx_checkpoint_write(path, &good, 1, twice, 2), EMX_ERR_INVALID);
  assert_int_equal(emx_checkpoint_write(path, &good, 1, broken, 1), EMX_ERR_INVALID);
  assert_int_equal(emx_checkpoint_write(path, &good, 1, absent, 1), EMX_ERR_INVALID);

  /* The disk refuses half-way, for root as well: a file size limit that the header fits under and the data does not. */
  struct rlimit old, tight = {.rlim_cur = 1024};
  getrlimit(RLIMIT_FSIZE, &old);
  tight.rlim_max = old.rlim_max;
  signal(SIGXFSZ, SIG_IGN);
  float *many = calloc(4096, sizeof *many);
  assert_non_null(many);
  t.tensor = emx_tensor_view(many, EMX_F32, 1, (int64_t[]){4096});
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &tight), 0);
  emx_status status = emx_checkpoint_write(path, &t, 1, NULL, 0);
  setrlimit(RLIMIT_FSIZE, &old);
  signal(SIGXFSZ, SIG_DFL);
  free(many);
  assert_int_equal(status, EMX_ERR_IO);
  assert_int_equal(files(), 1); /* no temporary file stays */

  /* Out of memory at every allocation of ours. */
  int failures = 0;
  for (status = EMX_ERR_NOMEM; status; failures++) {
    emxi_alloc_fail_after(failures);
    status = emx_checkpoint_write(path, &good, 1, NULL, 0);
    assert_true(!status || status == EMX_ERR_NOMEM);
    emxi_alloc_fail_after(-1);
  }
  assert_true(failures > 2);

  assert_int_equal(emxi_file_read(path, 4096, &after, &size_after), EMX_OK);
  assert_int_equal(size, size_after);
  assert_memory_equal(before, after, size);
  emxi_free(before);
  emxi_free(after);

  /* A directory in the way of the name; a folder that is not there. */
  char inner[300];
  unlink(path);
  assert_int_equal(mkdir(path, 0777), 0);
  assert_int_equal(emx_checkpoint_write(path, &good, 1, NULL, 0), EMX_ERR_IO);
  assert_int_equal(files(), 1);
  rmdir(path);
  snprintf(inner, sizeof inner, "%s/none/x", folder);
  assert_int_equal(emx_checkpoint_write(inner, &good, 1, NULL, 0), EMX_ERR_IO);
  if (geteuid()) { /* root writes anywhere */
    chmod(folder, 0500);
    assert_int_equal(emx_checkpoint_write(path, &good, 1, NULL, 0), EMX_ERR_IO);
    chmod(folder, 0700);
  }
}

/* Names that a crashed process of our id left behind are stepped over, and a planted link is not written through. */
static void test_names_in_the_way(void **state) {
  (void)state;
  float w = 1;
  const emx_named_tensor good = {"w", emx_tensor_view(&w, EMX_F32, 1, (int64_t[]){1})};
  enum { NAMES = 40 };
  char name[NAMES][300], victim[300];
  snprintf(victim, sizeof victim, "%s/victim", folder);
  fclose(fopen(victim, "w"));
  for (int i = 0; i < NAMES; i++) { /* the serial number is somewhere near zero: the other tests wrote fewer files than this */
    snprintf(name[i], sizeof name[i], "%s.%ld-%d.tmp", path, (long)getpid(), i);
    assert_int_equal(symlink(victim, name[i]), 0);
  }
  assert_int_equal(emx_checkpoint_write(path, &good, 1, NULL, 0), EMX_OK);
  struct stat st;
  assert_int_equal(stat(victim, &st), 0);
  assert_int_equal(st.st_size, 0);
  assert_int_equal(files(), NAMES + 2);
  for (int i = 0; i < NAMES; i++) unlink(name[i]);
  unlink(victim);
}

/* A pipe stays a pipe; a link stays a link, and what it points to is replaced. */
static void test_special_files(void **state) {
  (void)state;
  const float one[1] = {1};
  const emx_named_tensor tensor = {"a", emx_tensor_view((void *)one, EMX_F32, 1, (int64_t[]){1})};
  char pipe[160], target[160], link[160];
  struct stat st;
  snprintf(pipe, sizeof pipe, "%s/pipe", folder);
  snprintf(target, sizeof target, "%s/target", folder);
  snprintf(link, sizeof link, "%s/link", folder);
  assert_int_equal(mkfifo(pipe, 0600), 0);
  assert_int_equal(emx_checkpoint_write(pipe, &tensor, 1, NULL, 0), EMX_ERR_IO);
  assert_non_null(strstr(emx_last_error(), "no regular file"));
  assert_true(!lstat(pipe, &st) && S_ISFIFO(st.st_mode));
  assert_int_equal(symlink(target, link), 0);
  assert_int_equal(emx_checkpoint_write(link, &tensor, 1, NULL, 0), EMX_ERR_IO); /* dangling */
  assert_int_equal(emx_checkpoint_write(target, &tensor, 1, NULL, 0), EMX_OK);
  assert_int_equal(truncate(target, 0), 0);
  assert_int_equal(emx_checkpoint_write(link, &tensor, 1, NULL, 0), EMX_OK);
  assert_true(!lstat(link, &st) && S_ISLNK(st.st_mode));
  assert_true(!lstat(target, &st) && st.st_size > 0);
  unlink(pipe), unlink(link), unlink(target);
}

static void test_out_of_memory(void **state) {
  (void)state;
  static const char header[] = "{" T("w", "F32", "[1]", 0, 4) "}";
  emx_checkpoint *ck;
  int failures = 0;
  for (emx_status status = EMX_ERR_NOMEM; status; failures++) {
    emxi_alloc_fail_after(failures);
    status = open_header(header, 4, &ck);
    emxi_alloc_fail_after(-1);
    assert_true(!status || status == EMX_ERR_NOMEM);
  }
  assert_true(failures > 2);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_round_trip),    cmocka_unit_test(test_accepts),       cmocka_unit_test(test_bad_headers),
      cmocka_unit_test(test_bad_files),     cmocka_unit_test(test_bad_writes),    cmocka_unit_test(test_names_in_the_way),
      cmocka_unit_test(test_special_files), cmocka_unit_test(test_out_of_memory),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
