/* SHA-256 (FIPS 180-4) of two inputs of the same size at once, where the processor has instructions for it.

   Each of those instructions waits for the one before it: a second, independent input fills the time in between, which
   nearly doubles what a core hashes. libcrypto hashes one input after the other. Only for checksums of frames: what
   proves who sent something is TLS. */

#ifndef AOSCORE_SHA256_PAIR_H
#define AOSCORE_SHA256_PAIR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <cpuid.h>
#include <immintrin.h>

#define SHA256_BLOCK 64
#define SHA256_LENGTH_AT 56

static const uint32_t sha256_constants[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* The state as the instructions want it: words a b e f and c d g h, highest first. */
typedef struct {
    __m128i abef, cdgh;
} sha256_state;

static inline int sha256_pair_is_there(void)
{
    unsigned int a, b, c, d;

    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & 1u << 29) && __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 19);
}

__attribute__((target("sha,sse4.1"))) static inline void sha256_pair_blocks(
    sha256_state state[2], const uint8_t *first, const uint8_t *second, size_t blocks)
{
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    __m128i abef0 = state[0].abef, cdgh0 = state[0].cdgh, abef1 = state[1].abef, cdgh1 = state[1].cdgh;

    for (; blocks; blocks--, first += SHA256_BLOCK, second += SHA256_BLOCK) {
        const __m128i before[4] = {abef0, cdgh0, abef1, cdgh1};
        __m128i words0[4], words1[4];

#pragma GCC unroll 16
        for (int step = 0; step < 16; step++) { /* of four rounds each */
            const int at = step & 3;
            __m128i constants = _mm_load_si128((const __m128i *)(sha256_constants + 4 * step));
            __m128i sum0, sum1;

            if (step < 4) {
                words0[at] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(first + 16 * step)), big_endian);
                words1[at] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(second + 16 * step)), big_endian);
            } else {
                const int next = (step + 1) & 3, over_next = (step + 2) & 3, last = (step + 3) & 3;

                words0[at] = _mm_sha256msg2_epu32(
                    _mm_add_epi32(_mm_sha256msg1_epu32(words0[at], words0[next]),
                                  _mm_alignr_epi8(words0[last], words0[over_next], 4)),
                    words0[last]);
                words1[at] = _mm_sha256msg2_epu32(
                    _mm_add_epi32(_mm_sha256msg1_epu32(words1[at], words1[next]),
                                  _mm_alignr_epi8(words1[last], words1[over_next], 4)),
                    words1[last]);
            }
            sum0 = _mm_add_epi32(words0[at], constants);
            sum1 = _mm_add_epi32(words1[at], constants);
            cdgh0 = _mm_sha256rnds2_epu32(cdgh0, abef0, sum0);
            cdgh1 = _mm_sha256rnds2_epu32(cdgh1, abef1, sum1);
            abef0 = _mm_sha256rnds2_epu32(abef0, cdgh0, _mm_shuffle_epi32(sum0, 0x0e));
            abef1 = _mm_sha256rnds2_epu32(abef1, cdgh1, _mm_shuffle_epi32(sum1, 0x0e));
        }
        abef0 = _mm_add_epi32(abef0, before[0]);
        cdgh0 = _mm_add_epi32(cdgh0, before[1]);
        abef1 = _mm_add_epi32(abef1, before[2]);
        cdgh1 = _mm_add_epi32(cdgh1, before[3]);
    }
    state[0].abef = abef0, state[0].cdgh = cdgh0, state[1].abef = abef1, state[1].cdgh = cdgh1;
}

__attribute__((target("sha,sse4.1"))) static void sha256_pair(
    const uint8_t *first, const uint8_t *second, size_t size, uint8_t *first_digest, uint8_t *second_digest)
{
    const __m128i abef = _mm_set_epi32(0x6a09e667, (int)0xbb67ae85, 0x510e527f, (int)0x9b05688c);
    const __m128i cdgh = _mm_set_epi32(0x3c6ef372, (int)0xa54ff53a, 0x1f83d9ab, 0x5be0cd19);
    sha256_state state[2] = {{abef, cdgh}, {abef, cdgh}};
    const uint8_t *inputs[2] = {first, second};
    uint8_t *digests[2] = {first_digest, second_digest};
    const size_t whole = size / SHA256_BLOCK, rest = size % SHA256_BLOCK;
    const size_t blocks = rest < SHA256_LENGTH_AT ? 1 : 2;
    uint8_t tails[2][2 * SHA256_BLOCK];

    sha256_pair_blocks(state, first, second, whole);
    for (int lane = 0; lane < 2; lane++) {
        uint8_t *tail = tails[lane];
        const uint64_t bits = (uint64_t)size * 8;

        memset(tail, 0, sizeof(tails[lane]));
        memcpy(tail, inputs[lane] + whole * SHA256_BLOCK, rest);
        tail[rest] = 0x80;
        for (int byte = 0; byte < 8; byte++)
            tail[blocks * SHA256_BLOCK - 1 - byte] = (uint8_t)(bits >> 8 * byte);
    }
    sha256_pair_blocks(state, tails[0], tails[1], blocks);
    for (int lane = 0; lane < 2; lane++) {
        uint32_t words[8];

        _mm_storeu_si128((__m128i *)words, state[lane].abef); /* f e b a */
        _mm_storeu_si128((__m128i *)(words + 4), state[lane].cdgh); /* h g d c */
        const uint32_t ordered[8] = {words[3], words[2], words[7], words[6], words[1], words[0], words[5], words[4]};
        for (int word = 0; word < 8; word++)
            for (int byte = 0; byte < 4; byte++)
                digests[lane][4 * word + byte] = (uint8_t)(ordered[word] >> (24 - 8 * byte));
    }
}

#else

static inline int sha256_pair_is_there(void)
{
    return 0;
}

static inline void sha256_pair(
    const uint8_t *first, const uint8_t *second, size_t size, uint8_t *first_digest, uint8_t *second_digest)
{
    (void)first, (void)second, (void)size, (void)first_digest, (void)second_digest;
}

#endif

#endif
