/* A call that must succeed, and one that must fail with a word in its detail. After cmocka.h. */
#ifndef CHECK_H
#define CHECK_H
#include <emx.h>
#include <string.h>

#define OK(call)                                                                     \
  do {                                                                               \
    emx_status ok_ = (call);                                                         \
    if (ok_) fail_msg("%s: %s (%s)", #call, emx_status_name(ok_), emx_last_error()); \
  } while (0)
static inline void fails(emx_status got, emx_status want, const char *word) {
  if (got != want || !strstr(emx_last_error(), word))
    fail_msg("%s (%s), expected %s with '%s'", emx_status_name(got), emx_last_error(), emx_status_name(want), word);
}
#endif
