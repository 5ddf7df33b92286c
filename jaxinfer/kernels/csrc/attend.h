// Attention over any vector type, as in tile.h: a Type says Elem, WIDTH, V, load, load_part, step and sum4.
#pragma once

#include "attention.h"
#include "tile.h"

namespace {

constexpr float NOTHING = -__builtin_inff();

// Keys and values of int8, whose scales are applied to scores and weights.
template <class T>
struct Bytes : T {
  using Elem = int8_t;
  static typename T::V load(const int8_t* p) { return T::codes(p); }
  static typename T::V load_part(const int8_t* p, int n) {
    int8_t part[T::WIDTH] = {};
    for (int i = 0; i < n; i++) part[i] = p[i];
    return T::codes(part);
  }
};

template <class T>
struct Attend {
  using Elem = typename T::Elem;
  using V = typename T::V;
  typedef int32_t I __attribute__((vector_size(sizeof(V))));
  static constexpr int64_t WIDTH = T::WIDTH, LINE = 64 / sizeof(Elem);  // of memory

  static V get(const float* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void put(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
  static V all(float x) { return T::zero() + x; }

  // e^x for x <= 0, within 2 ulp; what is below the normal numbers is 0. x = n ln 2 + f, n by the rounding of a sum, and
  // the polynomial of Cephes' expf in f.
  static V exp(V x) {
    const float ROUND = 12582912.0f;  // 1.5 2^23
    V n = x * 1.44269504f + ROUND;
    I power = (I)n << 23;
    n = n - ROUND;
    V f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    V y = T::step(all(1.3981999507e-3f), f, all(1.9875691500e-4f));
    y = T::step(all(8.3334519073e-3f), f, y);
    y = T::step(all(4.1665795894e-2f), f, y);
    y = T::step(all(1.6666665459e-1f), f, y);
    y = T::step(all(5.0000001201e-1f), f, y);
    y = T::step(f, f * f, y) + 1.0f;
    y = (V)((I)y + power);
    return x < -87.0f ? T::zero() : y;
  }

  static V tanh(V x) {
    V size = x < 0.0f ? -x : x;
    V e = exp(size * -2.0f);
    V y = (1.0f - e) / (1.0f + e);
    return x < 0.0f ? -y : y;
  }

  static int64_t width(const Attention& a) { return parts(a.H, WIDTH) * WIDTH; }

  static size_t scratch(const Attention& a) {
    int64_t rows = a.queries(), H = width(a);
    return size_t(2 * rows * H + rows * (SLOTS + 2) + SLOTS * H + 64) * sizeof(float);
  }

  // n rows of H numbers, as floats that lie `stride` apart; zeros follow them up to whole vectors. Meanwhile it asks
  // memory for the n rows behind them.
  static const float* rows(const Elem* from, int64_t n, int64_t H, float* held, int64_t* stride) {
    if constexpr (sizeof(Elem) == sizeof(float)) {
      *stride = H;
      if (H % WIDTH == 0) return (const float*)from;
    }
    int64_t full = H / WIDTH, rest = H % WIDTH;
    *stride = parts(H, WIDTH) * WIDTH;
    for (int64_t s = 0; s < n; s++) {
      const Elem* row = from + s * H;
      float* to = held + s * *stride;
      for (int64_t i = 0; i < H; i += LINE) __builtin_prefetch(row + n * H + i);
      int64_t i = 0;
      for (; i + 4 <= full; i += 4) {
        V part[4];
        EACH(c, 4) part[c] = T::load(row + (i + c) * WIDTH);
        EACH(c, 4) put(to + (i + c) * WIDTH, part[c]);
      }
      for (; i < full; i++) put(to + i * WIDTH, T::load(row + i * WIDTH));
      if (rest) put(to + full * WIDTH, T::load_part(row + full * WIDTH, int(rest)));
    }
    return held;
  }

  // Scores of R queries and n slots.
  template <int R>
  static void products(const float* q, const float* k, int64_t stride, int64_t n, int64_t H, float* scores) {
    for (int64_t s = 0; s < n; s += 4) {
      const float* row[4];
      EACH(c, 4) row[c] = k + least(s + c, n - 1) * stride;
      V sum[R][4];
      EACH(r, R) EACH(c, 4) sum[r][c] = T::zero();
      for (int64_t i = 0; i < H; i += WIDTH) {
        V part[4];
        EACH(c, 4) part[c] = get(row[c] + i);
        EACH(r, R) {
          V x = get(q + r * H + i);
          EACH(c, 4) sum[r][c] = T::step(sum[r][c], x, part[c]);
        }
      }
      EACH(r, R) *(F4*)(scores + r * SLOTS + s) = T::sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    }
  }

  // Adds the values of n slots, each with its weight, to R sums, C vectors of them.
  template <int R, int C>
  static void weighted(const float* weights, const float* v, int64_t stride, int64_t n, int64_t H, float* sums) {
    V sum[R][C];
    EACH(r, R) EACH(c, C) sum[r][c] = get(sums + r * H + c * WIDTH);
    for (int64_t s = 0; s < n; s++) {
      V part[C];
      EACH(c, C) part[c] = get(v + s * stride + c * WIDTH);
      EACH(r, R) {
        V weight = all(weights[r * SLOTS + s]);
        EACH(c, C) sum[r][c] = T::step(sum[r][c], weight, part[c]);
      }
    }
    EACH(r, R) EACH(c, C) put(sums + r * H + c * WIDTH, sum[r][c]);
  }

  template <int R>
  static void values(const float* weights, const float* v, int64_t stride, int64_t n, int64_t H, float* sums) {
    int64_t i = 0;
    for (; i + 4 * WIDTH <= H; i += 4 * WIDTH) weighted<R, 4>(weights, v + i, stride, n, H, sums + i);
    for (; i < H; i += WIDTH) weighted<R, 1>(weights, v + i, stride, n, H, sums + i);
  }

  // What the scores [SLOTS] of one query and n slots from `first` on are: scaled, capped, and NOTHING where unseen.
  static void finish(const Attention& a, int64_t b, int64_t at, int32_t position, int64_t first, int64_t n, float* s) {
    for (int64_t i = 0; i < SLOTS; i += WIDTH) {
      V x = get(s + i) * a.scale;
      if (a.k_scale && i + WIDTH <= n) {
        x = x * get(a.k_scale + at + first + i);
      } else if (a.k_scale) {
        float part[WIDTH] = {};
        for (int64_t j = i; j < n; j++) part[j - i] = a.k_scale[at + first + j];
        x = x * get(part);
      }
      if (a.cap != 0) x = tanh(x / a.cap) * a.cap;
      put(s + i, x);
    }
    for (int64_t i = n; i < SLOTS; i++) s[i] = NOTHING;
    int64_t since = a.window ? position - a.window : -1;
    bool whole = !a.slot && position < PAST && first + n - 1 <= position && first > since;
    for (int64_t i = 0; i < n && !whole; i++) {
      int64_t place = a.slot ? a.slot[b * a.S + first + i] : first + i;
      if (position >= PAST || place > position || (place <= since && place >= a.sinks)) s[i] = NOTHING;
    }
  }

  static void span(const Attention& a, int64_t b, int64_t h, int64_t begin, int64_t end, float* sums, void* scratch) {
    int64_t R = a.queries(), H = width(a), G = a.N / a.K, at = (b * a.K + h) * a.S;
    float* q = (float*)scratch;
    float *out = q + R * H, *weights = out + R * H, *held = weights + R * SLOTS, *best = held + SLOTS * H,
          *total = best + R;
    for (int64_t r = 0; r < R; r++) {
      const float* from = a.q + ((b * a.T + r % a.T) * a.N + h * G + r / a.T) * a.H;
      for (int64_t i = 0; i < H; i++) q[r * H + i] = i < a.H ? from[i] : 0, out[r * H + i] = 0;
      best[r] = NOTHING, total[r] = 0;
    }
    for (int64_t first = begin; first < end; first += SLOTS) {
      int64_t n = least(SLOTS, end - first), stride, r = 0;
      const float* k = rows((const Elem*)a.k + (at + first) * a.H, n, a.H, held, &stride);
      for (; r + 2 <= R; r += 2) products<2>(q + r * H, k, stride, n, H, weights + r * SLOTS);
      for (; r < R; r++) products<1>(q + r * H, k, stride, n, H, weights + r * SLOTS);
      for (r = 0; r < R; r++) {
        float* s = weights + r * SLOTS;
        finish(a, b, at, a.position[b * a.T + r % a.T], first, n, s);
        weigh(a, at + first, n, H, s, best + r, total + r, out + r * H);
      }
      const float* v = rows((const Elem*)a.v + (at + first) * a.H, n, a.H, held, &stride);
      for (r = 0; r + 4 <= R; r += 4) values<4>(weights + r * SLOTS, v, stride, n, H, out + r * H);
      for (; r < R; r++) values<1>(weights + r * SLOTS, v, stride, n, H, out + r * H);
    }
    for (int64_t r = 0; r < R; r++) {
      float* to = sums + r * (a.H + 2);
      to[0] = best[r], to[1] = total[r];
      for (int64_t i = 0; i < a.H; i++) to[2 + i] = out[r * H + i];
    }
  }

  // Scores [SLOTS] become weights, times the scales of the values; what was summed before fades to the new largest.
  static void weigh(const Attention& a, int64_t at, int64_t n, int64_t H, float* s, float* best, float* total,
                    float* out) {
    V most = get(s);
    for (int64_t i = WIDTH; i < SLOTS; i += WIDTH) {
      V one = get(s + i);
      most = one > most ? one : most;
    }
    float lane[WIDTH], peak = *best;
    put(lane, most);
    for (int64_t i = 0; i < WIDTH; i++) peak = lane[i] > peak ? lane[i] : peak;
    float base = peak == NOTHING ? 0 : peak;
    if (peak > *best) {
      float fade[WIDTH];
      put(fade, exp(all(*best - peak)));
      *total *= fade[0];
      for (int64_t i = 0; i < H; i += WIDTH) put(out + i, get(out + i) * fade[0]);
      *best = peak;
    }
    V sum = T::zero();
    for (int64_t i = 0; i < SLOTS; i += WIDTH) {
      V weight = exp(get(s + i) - base);
      put(s + i, weight);
      sum = sum + weight;
    }
    F4 four = T::sum4(sum, T::zero(), T::zero(), T::zero());
    *total += four[0];
    for (int64_t i = 0; a.v_scale && i < n; i++) s[i] *= a.v_scale[at + i];
  }

  static void merge(const Attention& a, int64_t b, int64_t h, int64_t spans, const float* sums) {
    int64_t R = a.queries(), G = a.N / a.K, size = a.H + 2;
    for (int64_t r = 0; r < R; r++) {
      float* to = a.out + ((b * a.T + r % a.T) * a.N + h * G + r / a.T) * a.H;
      float best = NOTHING, total = 0;
      for (int64_t s = 0; s < spans; s++) {
        float one = sums[(s * R + r) * size];
        best = one > best ? one : best;
      }
      for (int64_t i = 0; i < a.H; i++) to[i] = 0;
      for (int64_t s = 0; s < spans; s++) {
        const float* from = sums + (s * R + r) * size;
        if (from[1] == 0) continue;
        float fade[WIDTH];
        put(fade, exp(all(from[0] == NOTHING ? 0 : from[0] - best)));
        total += from[1] * fade[0];
        for (int64_t i = 0; i < a.H; i++) to[i] += from[2 + i] * fade[0];
      }
      for (int64_t i = 0; total != 0 && i < a.H; i++) to[i] /= total;
    }
  }

  static constexpr Attender attender() { return {scratch, span, merge}; }
};

}  // namespace
