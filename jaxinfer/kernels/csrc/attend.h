// Attention over any vector type, as in tile.h: a Type says Elem, WIDTH, V, load, load_part, all, step and sum4.
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

template <class V>
V vector(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
void put(float* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Where query r of a row and kv head lies among all, [B, T, N].
inline int64_t query(const Attention& a, int64_t b, int64_t h, int64_t r) {
  return (b * a.T + r % a.T) * a.N + h * (a.N / a.K) + r / a.T;
}
// The numbers of that query, which are widened in `room` if they must be.
inline const float* floats(const Attention& a, int64_t query, float* room) {
  if (!a.half) return (const float*)a.q + query * a.H;
  const uint16_t* from = (const uint16_t*)a.q + query * a.H;
  for (int64_t i = 0; i < a.H; i++) room[i] = widen(from[i]);
  return room;
}
// What comes out for a query: its weighted sums over the sum of its weights, zeros where there are none.
inline void give(const Attention& a, int64_t query, const float* sums, float total) {
  float* to = (float*)a.out + query * a.H;
  uint16_t* half = (uint16_t*)a.out + query * a.H;
  if (a.half) {
    for (int64_t i = 0; i < a.H; i++) half[i] = narrow(total == 0 ? 0 : sums[i] / total);
  } else {
    for (int64_t i = 0; i < a.H; i++) to[i] = total == 0 ? 0 : sums[i] / total;
  }
}

// Slots whose scores are made together: the pieces of them that lie side by side, and the scales of codes.
struct Piece {
  int64_t start, n, place;
};

struct Block {
  int64_t n = 0;
  int count = 0;
  Piece piece[SLOTS / FOUR];
  float k_scale[SLOTS] = {}, v_scale[SLOTS] = {};

  Block(const Attention& a, int64_t b, int64_t h, int64_t first, int64_t end) {
    for (int64_t most = least(SLOTS, end - first); n < most; count++) {
      piece[count] = {n, least(most - n, a.together(first + n)), a.place(b, h, first + n)};
      for (int64_t i = 0; a.k_scale && i < piece[count].n; i++) {
        k_scale[n + i] = a.k_scale[piece[count].place + i];
        v_scale[n + i] = a.v_scale[piece[count].place + i];
      }
      n += piece[count].n;
    }
  }
};

// How queries and weights meet keys and values of any form: as floats. Another way says the same: Query, what a query is
// made of when it is ready; MANY, queries whose sums fit the registers; width, of a ready query and of sums, for H
// numbers; place, where in its sum the value i lies; ready, which gives the factor of its scores; scores, values.
template <class T>
struct Floats {
  using Query = float;
  using Elem = typename T::Elem;
  using V = typename T::V;
  static constexpr int64_t WIDTH = T::WIDTH, LINE = 64 / sizeof(Elem);  // of memory
  static constexpr int MANY = T::ROWS > 3 ? 4 : 2;

  static int64_t width(int64_t H) { return parts(H, WIDTH) * WIDTH; }
  static int64_t place(int64_t i) { return i; }
  static float ready(const float* from, int64_t H, float* to) {
    for (int64_t i = 0; i < width(H); i++) to[i] = i < H ? from[i] : 0;
    return 1;
  }

  // Of R queries and n slots. Meanwhile it asks memory for their values and for as many keys that come next, unless that
  // is null.
  template <int R>
  static void scores(const float* q, const Elem* k, const Elem* v, const Elem* next, int64_t n, int64_t H, float* to) {
    int64_t full = H / WIDTH * WIDTH;
    for (int64_t s = 0; s < n; s += 4) {
      const Elem* row[4];
      EACH(c, 4) row[c] = k + least(s + c, n - 1) * H;
      for (int64_t i = s * H; next && i < (s + 4) * H; i += LINE) {
        __builtin_prefetch(v + i, 0, SECOND_CACHE);
        __builtin_prefetch(next + i, 0, SECOND_CACHE);
      }
      V sum[R][4], part[4];
      EACH(r, R) EACH(c, 4) sum[r][c] = T::zero();
      for (int64_t i = 0; i < width(H); i += WIDTH) {
        if (i < full) {
          EACH(c, 4) part[c] = T::load(row[c] + i);
        } else {
          EACH(c, 4) part[c] = T::load_part(row[c] + i, int(H - i));
        }
        EACH(r, R) {
          V x = vector<V>(q + r * width(H) + i);
          EACH(c, 4) sum[r][c] = T::step(sum[r][c], x, part[c]);
        }
      }
      EACH(r, R) *(F4*)(to + r * SLOTS + s) = T::sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    }
  }

  // Adds the values of a block, each with its weight, to R sums: C vectors of them; `rest` numbers, if it is not 0.
  template <int R, int C>
  static void weighted(const float* weights, const Elem* v, const Block& block, int64_t H, int rest, float* sums) {
    V sum[R][C], part[C];
    EACH(r, R) EACH(c, C) sum[r][c] = vector<V>(sums + r * width(H) + c * WIDTH);
    for (int i = 0; i < block.count; i++) {
      const Piece& own = block.piece[i];
      const Elem* from = v + own.place * H;
      for (int64_t s = 0; s < own.n; s++) {
        if (rest) {
          part[0] = T::load_part(from + s * H, rest);
        } else {
          EACH(c, C) part[c] = T::load(from + s * H + c * WIDTH);
        }
        EACH(r, R) {
          V weight = T::all(weights[r * SLOTS + own.start + s]);
          EACH(c, C) sum[r][c] = T::step(sum[r][c], weight, part[c]);
        }
      }
    }
    EACH(r, R) EACH(c, C) put<V>(sums + r * width(H) + c * WIDTH, sum[r][c]);
  }

  template <int R>
  static void values(const float* weights, const Elem* v, const Block& block, int64_t H, float* sums) {
    int64_t i = 0;
    for (; i + 4 * WIDTH <= H; i += 4 * WIDTH) weighted<R, 4>(weights, v + i, block, H, 0, sums + i);
    for (; i + WIDTH <= H; i += WIDTH) weighted<R, 1>(weights, v + i, block, H, 0, sums + i);
    if (i < H) weighted<R, 1>(weights, v + i, block, H, int(H - i), sums + i);
  }
};

template <class T, class P = Floats<T>>
struct Attend {
  using Elem = typename P::Elem;
  using Query = typename P::Query;
  using V = typename T::V;
  typedef int32_t I __attribute__((vector_size(sizeof(V))));
  static constexpr int64_t WIDTH = T::WIDTH;
  static constexpr int MANY = P::MANY;

  static V get(const float* p) { return vector<V>(p); }

  // e^x for x <= 0, within 2 ulp; what is below the normal numbers is 0. x = n ln 2 + f, n by the rounding of a sum, and
  // the polynomial of Cephes' expf in f.
  static V exp(V x) {
    const float ROUND = 12582912.0f;  // 1.5 2^23
    V n = x * 1.44269504f + ROUND;
    I power = (I)n << 23;
    n = n - ROUND;
    V f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    V y = T::step(T::all(1.3981999507e-3f), f, T::all(1.9875691500e-4f));
    y = T::step(T::all(8.3334519073e-3f), f, y);
    y = T::step(T::all(4.1665795894e-2f), f, y);
    y = T::step(T::all(1.6666665459e-1f), f, y);
    y = T::step(T::all(5.0000001201e-1f), f, y);
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

  static size_t scratch(const Attention& a) {
    return size_t(a.queries() * (2 * P::width(a.H) + SLOTS + 3) + a.H) * sizeof(float);
  }

  // What the scores [SLOTS] of one query and a block from `first` on are: scaled, capped, and NOTHING where unseen.
  static void finish(const Attention& a, int64_t b, int32_t position, float scale, int64_t first, const Block& block,
                     float* s) {
    int64_t n = block.n;
    for (int64_t i = 0; i < SLOTS; i += WIDTH) {
      V x = get(s + i) * scale;
      if (a.k_scale) x = x * get(block.k_scale + i);
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

  static void span(const Attention& a, const Span& span, const Foresight&, float* sums, void* scratch) {
    int64_t b = span.b, h = span.h, begin = span.begin, end = span.end;
    int64_t R = a.queries(), H = P::width(a.H);
    float *out = (float*)scratch, *weights = out + R * H, *best = weights + R * SLOTS, *total = best + R;
    float* factor = total + R;
    Query* q = (Query*)(factor + R);
    float* room = (float*)(q + R * H);
    const Elem *keys = (const Elem*)a.k, *values = (const Elem*)a.v;
    for (int64_t r = 0; r < R; r++) {
      factor[r] = P::ready(floats(a, query(a, b, h, r), room), a.H, q + r * H);
      for (int64_t i = 0; i < H; i++) out[r * H + i] = 0;
      best[r] = NOTHING, total[r] = 0;
    }
    for (int64_t first = begin; first < end; first += SLOTS) {
      const Block block(a, b, h, first, end);
      for (int i = 0; i < block.count; i++) {
        const Piece& own = block.piece[i];
        int64_t after = first + own.start + own.n, ahead = a.place(b, h, after < end ? after : first);
        const Elem *k = keys + own.place * a.H, *v = values + own.place * a.H, *next = keys + ahead * a.H;
        float* to = weights + own.start;
        int64_t r = 0;
        for (; r + MANY <= R; r += MANY, next = nullptr)
          P::template scores<MANY>(q + r * H, k, v, next, own.n, a.H, to + r * SLOTS);
        for (; r < R; r++, next = nullptr) P::template scores<1>(q + r * H, k, v, next, own.n, a.H, to + r * SLOTS);
      }
      int64_t r = 0;
      for (; r < R; r++) finish(a, b, a.position[b * a.T + r % a.T], a.scale * factor[r], first, block, weights + r * SLOTS);
      for (r = 0; r + MANY <= R; r += MANY)
        weigh<MANY>(a, block, H, weights + r * SLOTS, best + r, total + r, out + r * H);
      for (; r < R; r++) weigh<1>(a, block, H, weights + r * SLOTS, best + r, total + r, out + r * H);
      for (r = 0; r + MANY <= R; r += MANY)
        P::template values<MANY>(weights + r * SLOTS, values, block, a.H, out + r * H);
      for (; r < R; r++) P::template values<1>(weights + r * SLOTS, values, block, a.H, out + r * H);
    }
    for (int64_t r = 0; r < R; r++) {
      float* to = sums + r * (a.H + 2);
      to[0] = best[r], to[1] = total[r];
      for (int64_t i = 0; i < a.H; i++) to[2 + i] = out[r * H + P::place(i)];
    }
  }

  // Scores [R, SLOTS] become weights, times the scales of the values; what was summed before fades to the new largest.
  template <int R>
  static void weigh(const Attention& a, const Block& block, int64_t H, float* s, float* best, float* total, float* out) {
    V sum[R];
    float base[R];
    EACH(r, R) {
      V most = get(s + r * SLOTS);
      for (int64_t i = WIDTH; i < SLOTS; i += WIDTH) {
        V one = get(s + r * SLOTS + i);
        most = one > most ? one : most;
      }
      float lane[WIDTH], peak = best[r];
      put(lane, most);
      F4 four = *(F4*)lane;
      for (int64_t i = 4; i < WIDTH; i += 4) four = *(F4*)(lane + i) > four ? *(F4*)(lane + i) : four;
      EACH(i, 4) peak = four[i] > peak ? four[i] : peak;
      base[r] = peak == NOTHING ? 0 : peak;
      if (peak > best[r]) fade(exp(T::all(best[r] - peak)), H, total + r, out + r * H);
      best[r] = peak;
      sum[r] = T::zero();
    }
    for (int64_t i = 0; i < SLOTS; i += WIDTH) {
      V weight[R];
      EACH(r, R) weight[r] = exp(get(s + r * SLOTS + i) - base[r]);
      EACH(r, R) sum[r] = sum[r] + weight[r];
      EACH(r, R) put(s + r * SLOTS + i, weight[r]);
    }
    EACH(r, R) total[r] += T::sum4(sum[r], T::zero(), T::zero(), T::zero())[0];
    for (int64_t r = 0; a.v_scale && r < R; r++)
      for (int64_t i = 0; i < SLOTS; i += WIDTH) put(s + r * SLOTS + i, get(s + r * SLOTS + i) * get(block.v_scale + i));
  }

  static void fade(V by, int64_t H, float* total, float* out) {
    *total *= by[0];
    for (int64_t i = 0; i < H; i += WIDTH) put(out + i, get(out + i) * by);
  }

  static void merge(const Attention& a, int64_t b, int64_t h, int64_t spans, float* sums) {
    int64_t R = a.queries(), size = a.H + 2;
    for (int64_t r = 0; r < R; r++) {
      float best = NOTHING, total = 0, *to = sums + r * size + 2;
      for (int64_t s = 0; s < spans; s++) {
        float one = sums[(s * R + r) * size];
        best = one > best ? one : best;
      }
      for (int64_t i = 0; to[-1] == 0 && i < a.H; i++) to[i] = 0;  // of values that it does not see, and may be none
      for (int64_t s = 0; s < spans; s++) {
        const float* from = sums + (s * R + r) * size;
        if (from[1] == 0) continue;
        float fade[WIDTH];
        put(fade, exp(T::all(from[0] == NOTHING ? 0 : from[0] - best)));
        total += from[1] * fade[0];
        for (int64_t i = 0; i < a.H; i++) to[i] = (s ? to[i] : 0) + from[2 + i] * fade[0];
      }
      give(a, query(a, b, h, r), to, total);
    }
  }

  static constexpr Attender attender() { return {scratch, span, merge}; }
};

}  // namespace
