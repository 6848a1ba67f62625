// One more token of one answer on a CPU: all layers in one call, weights read as they are stored.
//
// Sums are float32 throughout. The parts of a token are handed out piece by piece: who comes first
// takes the next piece, and nobody waits for a thread that holds none. A barrier would: where other
// work keeps a thread from its core, every part of a token would last until it gets there.
//
// decoding_step.py declares the same structures.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <immintrin.h>
#include <sched.h>

namespace {

// ---- Sixteen numbers at a time ------------------------------------------------------------------

#if defined(__AVX512F__) && !defined(QLORA_KIT_NARROW)

struct Wide { __m512 v; };
struct Nibbles { __m512i high, low; };

inline Wide zero() { return {_mm512_setzero_ps()}; }
inline Wide fill(float x) { return {_mm512_set1_ps(x)}; }
inline Wide load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Wide load(const uint16_t* p) {  // bfloat16
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Wide add(Wide a, Wide b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Wide multiply_add(Wide a, Wide b, Wide c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float sum(Wide a) { return _mm512_reduce_add_ps(a.v); }
inline void store(float* p, Wide a) { _mm512_storeu_ps(p, a.v); }

inline Nibbles split(const uint8_t* p) {
  __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  return {_mm512_srli_epi32(bytes, 4), bytes};  // a look-up takes the last four bits
}
struct Table {
  __m512 values;
  explicit Table(const float* p) : values(_mm512_loadu_ps(p)) {}
  Wide operator()(__m512i at) const { return {_mm512_permutexvar_ps(at, values)}; }
};

#else

struct Wide { __m256 a, b; };
struct Sixteen { __m256i a, b; };
struct Nibbles { Sixteen high, low; };

inline Wide zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Wide fill(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Wide load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 load_half(const uint16_t* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Wide load(const uint16_t* p) { return {load_half(p), load_half(p + 8)}; }
inline Wide add(Wide x, Wide y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Wide multiply_add(Wide x, Wide y, Wide z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline void store(float* p, Wide x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline float sum(Wide x) {
  float parts[8], total = 0;
  _mm256_storeu_ps(parts, _mm256_add_ps(x.a, x.b));
  for (float part : parts) total += part;
  return total;
}

inline Nibbles split(const uint8_t* p) {
  __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  Sixteen whole{_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
  return {{_mm256_srli_epi32(whole.a, 4), _mm256_srli_epi32(whole.b, 4)}, whole};
}
struct Table {
  __m256 first, last;
  explicit Table(const float* p) : first(_mm256_loadu_ps(p)), last(_mm256_loadu_ps(p + 8)) {}
  __m256 look(__m256i at) const {  // by the last three bits in either half, the fourth chooses
    __m256 is_last = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));
    return _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(first, at), _mm256_permutevar8x32_ps(last, at), is_last);
  }
  Wide operator()(Sixteen at) const { return {look(at.a), look(at.b)}; }
};

#endif

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline void narrow(float x, float* p) { *p = x; }
inline void narrow(float x, uint16_t* p) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) { *p = 0x7fc0; return; }
  *p = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename T>
float dot(const T* w, const float* x, int64_t n) {
  Wide a = zero(), b = zero(), c = zero(), d = zero();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    a = multiply_add(load(w + i), load(x + i), a);
    b = multiply_add(load(w + i + 16), load(x + i + 16), b);
    c = multiply_add(load(w + i + 32), load(x + i + 32), c);
    d = multiply_add(load(w + i + 48), load(x + i + 48), d);
  }
  for (; i + 16 <= n; i += 16) a = multiply_add(load(w + i), load(x + i), a);
  float total = sum(add(add(a, b), add(c, d)));
  for (; i < n; i++) total += widen(w[i]) * x[i];
  return total;
}

// ---- What decoding_step.py describes ------------------------------------------------------------

struct Matrix {
  const void* weight;    // packed, or in the model's dtype, (rows, columns)
  const float* scales;   // block maxima, or null
  int64_t rows;
  int64_t rank, first;   // where its share of the group's ranks begins
};

struct Group {
  Matrix parts[3];
  int64_t count, rows, columns, blocksize;
  const float* levels;   // the sixteen values of four bits
  const void* bias;      // (rows), or null
  const void* down;      // (ranks, columns), or null
  const void* up;        // (rows, ranks)
  int64_t ranks;
};

struct Layer {
  const void *input_norm, *post_norm, *q_norm, *k_norm;  // the latter two may be null
  Group qkv, out, gate_up, down;
};

struct Model {
  const Layer* layers;
  int64_t count, hidden, heads, groups, size, intermediate, vocabulary;
  const void *embedding, *norm, *head;
  double epsilon;
};

struct Call {
  int64_t token, position;
  void *keys, *values;     // of the first layer, (groups, capacity, size)
  int64_t capacity, apart; // numbers from one layer's to the next one's
  const void *cos, *sin;   // (capacity, size)
  float* logits;
  int64_t threads;
};

// ---- Handing out pieces -------------------------------------------------------------------------

struct alignas(64) Part {
  std::atomic<int64_t> next{0}, done{0};
};

template <typename Work>
void share(Part& part, int64_t pieces, Work work) {
  for (int64_t at; (at = part.next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
    work(at);
    part.done.fetch_add(1, std::memory_order_release);
  }
  for (int tries = 0; part.done.load(std::memory_order_acquire) < pieces; tries++) {
    if (tries < 2000) _mm_pause();
    else sched_yield();
  }
}

// ---- A token ------------------------------------------------------------------------------------

template <typename T>
struct Step {
  const Model& model;
  const Call& call;
  const int64_t position;
  std::vector<float> state, qkv, attended, gated;
  std::vector<Part> parts;

  Step(const Model& m, const Call& c)
      : model(m), call(c), position(c.position), state(m.hidden),
        qkv((m.heads + 2 * m.groups) * m.size), attended(m.heads * m.size),
        gated(m.intermediate), parts(5 * m.count + 1) {
    const T* row = (const T*)m.embedding + c.token * m.hidden;
    for (int64_t i = 0; i < m.hidden; i++) state[i] = widen(row[i]);
  }

  // A product's input as one thread has it: as it is, and the pairs of packed bytes apart.
  struct Input {
    std::vector<float> x, apart, low;
    int64_t of = -1;  // the part it was made for
  };

  static void normalize(const float* from, const T* weight, int64_t n, double epsilon, float* to) {
    double squares = 0;
    for (int64_t i = 0; i < n; i++) squares += (double)from[i] * from[i];
    float factor = (float)(1.0 / std::sqrt(squares / n + epsilon));
    for (int64_t i = 0; i < n; i++) to[i] = widen(weight[i]) * (from[i] * factor);
  }

  void prepare(Input& input, int64_t part, const Group& group, const float* from, const void* norm) {
    if (input.of == part) return;
    input.of = part;
    int64_t n = group.columns;
    input.x.resize(n);
    if (norm) normalize(from, (const T*)norm, n, model.epsilon, input.x.data());
    else std::copy(from, from + n, input.x.begin());
    if (group.parts[0].scales) {
      input.apart.resize(n);
      for (int64_t i = 0; i < n; i += 32)
        for (int64_t j = 0; j < 16; j++) {
          input.apart[i + j] = input.x[i + 2 * j];
          input.apart[i + 16 + j] = input.x[i + 2 * j + 1];
        }
    }
    input.low.resize(group.ranks);
    for (int64_t r = 0; r < group.ranks; r++)
      input.low[r] = dot((const T*)group.down + r * n, input.x.data(), n);
  }

  static float multiply_packed(const Group& group, const Matrix& matrix, int64_t row, const float* x) {
    const Table levels(group.levels);
    const uint8_t* w = (const uint8_t*)matrix.weight + row * (group.columns / 2);
    const float* scale = matrix.scales + row * (group.columns / group.blocksize);
    Wide total = zero();
    for (const float* end = x + group.columns; x < end; scale++) {
      Wide a = zero(), b = zero();
      for (const float* block = x + group.blocksize; x < block; x += 32, w += 16) {
        Nibbles at = split(w);
        a = multiply_add(levels(at.high), load(x), a);
        b = multiply_add(levels(at.low), load(x + 16), b);
      }
      total = multiply_add(add(a, b), fill(*scale), total);
    }
    return sum(total);
  }

  float multiply(const Group& group, const Input& input, int64_t part, int64_t row) const {
    const Matrix& matrix = group.parts[part];
    int64_t at = row;  // among all of the group's
    for (int64_t before = 0; before < part; before++) at += group.parts[before].rows;
    float out = matrix.scales
        ? multiply_packed(group, matrix, row, input.apart.data())
        : dot((const T*)matrix.weight + row * group.columns, input.x.data(), group.columns);
    if (matrix.rank)
      out += dot((const T*)group.up + at * group.ranks + matrix.first,
                 input.low.data() + matrix.first, matrix.rank);
    if (group.bias) out += widen(((const T*)group.bias)[at]);
    return out;
  }

  // Rows of a product in pieces; what happens to a row is the caller's.
  template <typename Each>
  void rows(int64_t part, int64_t count, Each each) {
    int64_t step = std::max<int64_t>(8, (count + 4 * call.threads - 1) / (4 * call.threads));
    share(parts[part], (count + step - 1) / step, [&](int64_t piece) {
      int64_t end = std::min(count, (piece + 1) * step);
      each(piece * step, end);
    });
  }

  void rotate(const float* from, const void* norm, float* to) const {
    int64_t size = model.size, half = size / 2;
    std::vector<float> normed;
    if (norm) {
      normed.resize(size);
      normalize(from, (const T*)norm, size, model.epsilon, normed.data());
      from = normed.data();
    }
    const T* cos = (const T*)call.cos + position * size;
    const T* sin = (const T*)call.sin + position * size;
    for (int64_t i = 0; i < half; i++) {
      float a = from[i], b = from[i + half];
      to[i] = a * widen(cos[i]) - b * widen(sin[i]);
      to[i + half] = b * widen(cos[i + half]) + a * widen(sin[i + half]);
    }
  }

  void attend(int64_t index, int64_t head, std::vector<float>& room) {
    int64_t size = model.size, shared = model.heads / model.groups, group = head / shared;
    const Layer& layer = model.layers[index];
    T* keys = (T*)call.keys + index * call.apart + group * call.capacity * size;
    T* values = (T*)call.values + index * call.apart + group * call.capacity * size;
    room.resize(2 * size + position + 1);
    float *q = room.data(), *k = q + size, *chances = k + size;
    const float* v = qkv.data() + (model.heads + model.groups + group) * size;
    rotate(qkv.data() + head * size, layer.q_norm, q);
    rotate(qkv.data() + (model.heads + group) * size, layer.k_norm, k);
    if (head % shared == 0)  // the others go on with their own copy of this token's
      for (int64_t i = 0; i < size; i++) {
        narrow(k[i], keys + position * size + i);
        narrow(v[i], values + position * size + i);
      }
    float scale = 1 / std::sqrt((float)size), most = dot(k, q, size) * scale;
    chances[position] = most;
    for (int64_t t = 0; t < position; t++) {
      chances[t] = dot(keys + t * size, q, size) * scale;
      most = std::max(most, chances[t]);
    }
    float total = 0;
    for (int64_t t = 0; t <= position; t++) total += chances[t] = std::exp(chances[t] - most);
    float* out = attended.data() + head * size;
    for (int64_t i = 0; i < size; i += 16) {
      Wide a = multiply_add(load(v + i), fill(chances[position]), zero()), b = zero();
      int64_t t = 0;
      for (; t + 2 <= position; t += 2) {
        a = multiply_add(load(values + t * size + i), fill(chances[t]), a);
        b = multiply_add(load(values + (t + 1) * size + i), fill(chances[t + 1]), b);
      }
      if (t < position) a = multiply_add(load(values + t * size + i), fill(chances[t]), a);
      store(out + i, multiply_add(add(a, b), fill(1 / total), zero()));
    }
  }

  void run() {  // in every thread
    Input input;
    std::vector<float> room;
    for (int64_t index = 0; index < model.count; index++) {
      const Layer& layer = model.layers[index];
      int64_t part = 5 * index;
      rows(part, layer.qkv.rows, [&](int64_t begin, int64_t end) {
        prepare(input, part, layer.qkv, state.data(), layer.input_norm);
        for (int64_t at = begin, which = 0, before = 0; at < end; at++) {
          while (at - before >= layer.qkv.parts[which].rows)
            before += layer.qkv.parts[which++].rows;
          qkv[at] = multiply(layer.qkv, input, which, at - before);
        }
      });
      share(parts[part + 1], model.heads, [&](int64_t head) { attend(index, head, room); });
      rows(part + 2, model.hidden, [&](int64_t begin, int64_t end) {
        prepare(input, part + 2, layer.out, attended.data(), nullptr);
        for (int64_t at = begin; at < end; at++) state[at] += multiply(layer.out, input, 0, at);
      });
      rows(part + 3, model.intermediate, [&](int64_t begin, int64_t end) {
        prepare(input, part + 3, layer.gate_up, state.data(), layer.post_norm);
        for (int64_t at = begin; at < end; at++) {
          float gate = multiply(layer.gate_up, input, 0, at);
          gated[at] = gate / (1 + std::exp(-gate)) * multiply(layer.gate_up, input, 1, at);
        }
      });
      rows(part + 4, model.hidden, [&](int64_t begin, int64_t end) {
        prepare(input, part + 4, layer.down, gated.data(), nullptr);
        for (int64_t at = begin; at < end; at++) state[at] += multiply(layer.down, input, 0, at);
      });
    }
    bool is_normed = false;
    rows(5 * model.count, model.vocabulary, [&](int64_t begin, int64_t end) {
      if (!is_normed) {
        input.x.resize(model.hidden);
        normalize(state.data(), (const T*)model.norm, model.hidden, model.epsilon, input.x.data());
        is_normed = true;
      }
      for (int64_t at = begin; at < end; at++)
        call.logits[at] = dot((const T*)model.head + at * model.hidden, input.x.data(), model.hidden);
    });
  }
};

template <typename T>
void take_step(const Model& model, const Call& call) {
  Step<T> step(model, call);
#pragma omp parallel num_threads(call.threads)
  step.run();
}

}  // namespace

extern "C" void qlora_kit_step(const Model* model, const Call* call, int is_bfloat16) {
  if (is_bfloat16) take_step<uint16_t>(*model, *call);
  else take_step<float>(*model, *call);
}
