/* SPDX-License-Identifier: Apache-2.0
 * BLAKE2b (RFC 7693), unkeyed, 256 bits: about a byte a nanosecond without any instructions of its own, and anybody can check a
 * file with b2sum. It is the checksum of cache files and the identity of models; the second needs more than a CRC. */
#include "model.h"

#include <string.h>

static const uint64_t iv[8] = {0x6a09e667f3bcc908u, 0xbb67ae8584caa73bu, 0x3c6ef372fe94f82bu, 0xa54ff53a5f1d36f1u,
                               0x510e527fade682d1u, 0x9b05688c2b3e6c1fu, 0x1f83d9abfb41bd6bu, 0x5be0cd19137e2179u};
/* Section 2.7; rounds 10 and 11 are 0 and 1 again. */
static const uint8_t sigma[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

static inline uint64_t rotate(uint64_t x, int n) { return x >> n | x << (64 - n); }

/* The block has been counted in `bytes`. */
static void compress(uint64_t h[8], const uint8_t *block, uint64_t bytes, bool last) {
  uint64_t m[16], v[16];
  memcpy(m, block, sizeof m); /* little-endian, as everything here */
  memcpy(v, h, 64);
  memcpy(v + 8, iv, 64);
  v[12] ^= bytes; /* files have fewer than 2^64 */
  if (last) v[14] = ~v[14];
#define MIX(a, b, c, d, x, y)     \
  v[a] += v[b] + m[x];            \
  v[d] = rotate(v[d] ^ v[a], 32); \
  v[c] += v[d];                   \
  v[b] = rotate(v[b] ^ v[c], 24); \
  v[a] += v[b] + m[y];            \
  v[d] = rotate(v[d] ^ v[a], 16); \
  v[c] += v[d];                   \
  v[b] = rotate(v[b] ^ v[c], 63)
#define ROUND(r)                                   \
  do {                                             \
    MIX(0, 4, 8, 12, sigma[r][0], sigma[r][1]);    \
    MIX(1, 5, 9, 13, sigma[r][2], sigma[r][3]);    \
    MIX(2, 6, 10, 14, sigma[r][4], sigma[r][5]);   \
    MIX(3, 7, 11, 15, sigma[r][6], sigma[r][7]);   \
    MIX(0, 5, 10, 15, sigma[r][8], sigma[r][9]);   \
    MIX(1, 6, 11, 12, sigma[r][10], sigma[r][11]); \
    MIX(2, 7, 8, 13, sigma[r][12], sigma[r][13]);  \
    MIX(3, 4, 9, 14, sigma[r][14], sigma[r][15]);  \
  } while (0)
  ROUND(0); /* written out, so that the indices are constants */
  ROUND(1);
  ROUND(2);
  ROUND(3);
  ROUND(4);
  ROUND(5);
  ROUND(6);
  ROUND(7);
  ROUND(8);
  ROUND(9);
  ROUND(0);
  ROUND(1);
#undef ROUND
#undef MIX
  for (int i = 0; i < 8; i++) h[i] ^= v[i] ^ v[i + 8];
}

void emxi_hash_init(emxi_hash *hash) {
  *hash = (emxi_hash){0};
  memcpy(hash->h, iv, sizeof iv);
  hash->h[0] ^= 0x01010000u ^ EMXI_HASH_SIZE; /* parameter block: no key, no tree */
}

void emxi_hash_add(emxi_hash *hash, const void *data, size_t size) {
  const uint8_t *p = data;
  while (size) {
    if (!hash->used && size > sizeof hash->block) { /* straight from the caller; never the last block, which is marked */
      hash->bytes += sizeof hash->block;
      compress(hash->h, p, hash->bytes, false);
      p += sizeof hash->block;
      size -= sizeof hash->block;
      continue;
    }
    if (hash->used == sizeof hash->block) {
      hash->bytes += hash->used;
      compress(hash->h, hash->block, hash->bytes, false);
      hash->used = 0;
      continue;
    }
    const size_t room = sizeof hash->block - hash->used, n = size < room ? size : room;
    memcpy(hash->block + hash->used, p, n);
    hash->used += n;
    p += n;
    size -= n;
  }
}

void emxi_hash_end(emxi_hash *hash, uint8_t digest[EMXI_HASH_SIZE]) {
  hash->bytes += hash->used;
  memset(hash->block + hash->used, 0, sizeof hash->block - hash->used);
  compress(hash->h, hash->block, hash->bytes, true);
  memcpy(digest, hash->h, EMXI_HASH_SIZE);
}
