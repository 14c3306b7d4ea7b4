/* Loops of the widest instructions on registers alone: benchmarks/limit.py compiles and times them.

Each function runs `times` rounds and returns the operations of all: a product and a sum are two.
Twelve sums are independent (four of AMX, all that its tiles allow), which hides the units' latency. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The compiler must not know these values: it would drop what has no use, and merge what is equal. */
#define USED(x) __asm__ volatile("" : "+x"(x))
#define USED512(x) __asm__ volatile("" : "+v"(x))
#define OPAQUE(used) \
  used(sums[0]); used(sums[1]); used(sums[2]); used(sums[3]); used(sums[4]); used(sums[5]); \
  used(sums[6]); used(sums[7]); used(sums[8]); used(sums[9]); used(sums[10]); used(sums[11]);

#define REPEAT12(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)

__attribute__((target("avx2,fma"))) double avx2(int times) {
  __m256 sums[12], a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(1e-9f);
  memset(sums, 0, sizeof sums);
  OPAQUE(USED)
  for (int i = 0; i < times; i++) {
#define STEP(n) sums[n] = _mm256_fmadd_ps(a, b, sums[n]);
    REPEAT12(STEP)
#undef STEP
    USED(a);
  }
  OPAQUE(USED)
  return 2.0 * 8 * 12 * times;
}

__attribute__((target("avx512f"))) double avx512(int times) {
  __m512 sums[12], a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(1e-9f);
  memset(sums, 0, sizeof sums);
  OPAQUE(USED512)
  for (int i = 0; i < times; i++) {
#define STEP(n) sums[n] = _mm512_fmadd_ps(a, b, sums[n]);
    REPEAT12(STEP)
#undef STEP
    USED512(a);
  }
  OPAQUE(USED512)
  return 2.0 * 16 * 12 * times;
}

__attribute__((target("avx512f,avx512vnni"))) double vnni(int times) {
  __m512i sums[12], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(1);
  memset(sums, 0, sizeof sums);
  OPAQUE(USED512)
  for (int i = 0; i < times; i++) {
#define STEP(n) sums[n] = _mm512_dpbusd_epi32(sums[n], a, b);
    REPEAT12(STEP)
#undef STEP
    USED512(a);
  }
  OPAQUE(USED512)
  return 2.0 * 64 * 12 * times;
}

__attribute__((target("avx512f,avx512bf16"))) double avx512_bf16(int times) {
  __m512 sums[12];
  __m512bh a, b;
  memset(sums, 0, sizeof sums);
  memset(&a, 0, sizeof a);
  memset(&b, 0, sizeof b);
  OPAQUE(USED512)
  for (int i = 0; i < times; i++) {
#define STEP(n) sums[n] = _mm512_dpbf16_ps(sums[n], a, b);
    REPEAT12(STEP)
#undef STEP
    USED512(a);
  }
  OPAQUE(USED512)
  return 2.0 * 32 * 12 * times;
}

/* Four sums of 2 x 2 tiles, the largest that eight tiles allow. */
struct configuration {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

__attribute__((target("amx-tile"))) static void configure(void) {
  struct configuration all = {.palette = 1};
  for (int i = 0; i < 8; i++) all.bytes[i] = 64, all.rows[i] = 16;
  syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */);
  _tile_loadconfig(&all);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
}

__attribute__((target("amx-tile,amx-int8"))) double amx_int8(int times) {
  configure();
  for (int i = 0; i < times; i++) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return 2.0 * 16 * 16 * 64 * 4 * times;
}

__attribute__((target("amx-tile,amx-bf16"))) double amx_bf16(int times) {
  configure();
  for (int i = 0; i < times; i++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * 16 * 16 * 32 * 4 * times;
}
