// One more token of one answer on a CPU: all layers in one call, weights read as they are stored.
//
// Sums are float32 throughout. The parts of a token are handed out piece by piece: who comes first
// takes the next piece, and nobody waits for a thread that holds none. A barrier would: where other
// work keeps a thread from its core, every part of a token would last until it gets there.
//
// cpu_step.py declares the same structures.

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

// ---- What cpu_step.py describes -----------------------------------------------------------------

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

struct Norm {
  const void *weight, *bias;  // either may be null
  int64_t apart;              // numbers from one head's weights to the next one's
};

struct Layer {
  Norm before_attention, after_attention, before_mlp, after_mlp, q_norm, k_norm;
  Group qkv, out, gate_up, down;
  int64_t window;             // tokens that one looks at, itself included; 0 for all
};

enum Activation { SILU, GELU, GELU_TANH, RELU, RELU2 };

struct Model {
  const Layer* layers;
  int64_t count, hidden, heads, groups, size, intermediate, vocabulary;
  const void* embedding;
  Norm norm;
  const void* head;
  double epsilon;
  float multiplier, scale, softcap, residual, logit_scale, logit_softcap;
  int64_t centers, plus_one;  // norms: whether the mean is taken off, the weight is stored less one
  int64_t over_all, turned;   // norms of queries and keys: of all heads together, after turning
  int64_t in_pairs, is_gated, is_parallel, activation;
};

struct Call {
  int64_t token, position;
  void *keys, *values;     // of the first layer, (groups, capacity, size)
  int64_t capacity, apart; // numbers from one layer's to the next one's
  const float *const *cos, *const *sin;  // of each layer, (capacity, turns)
  int64_t turns;           // dimensions of a head that turn
  const float* stretch;    // what queries are multiplied with, (capacity), or null
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
  std::vector<float> state, qkv, attended, gated, delta;
  std::vector<Part> parts;

  Step(const Model& m, const Call& c)
      : model(m), call(c), position(c.position), state(m.hidden),
        qkv((m.heads + 2 * m.groups) * m.size), attended(m.heads * m.size),
        gated(m.intermediate),
        delta(m.hidden), parts(7 * m.count + 1) {
    const T* row = (const T*)m.embedding + c.token * m.hidden;
    for (int64_t i = 0; i < m.hidden; i++) state[i] = widen(row[i]) * m.multiplier;
  }

  // A product's input as one thread has it: as it is, and the pairs of packed bytes apart.
  struct Input {
    std::vector<float> x, apart, low;
    int64_t of = -1;  // the part it was made for
  };

  float cap(float x, float at) const { return at ? std::tanh(x / at) * at : x; }

  float activate(float x) const {
    switch (model.activation) {
      case GELU: return 0.5f * x * (1 + std::erf(x * (float)M_SQRT1_2));
      case GELU_TANH: {
        float inner = (float)(M_2_SQRTPI * M_SQRT1_2) * (x + 0.044715f * x * x * x);
        return 0.5f * x * (1 + std::tanh(inner));
      }
      case RELU: return std::max(x, 0.0f);
      case RELU2: return x > 0 ? x * x : 0;
      default: return x / (1 + std::exp(-x));
    }
  }

  // What is taken off numbers and what they are multiplied with.
  void measure(const float* from, int64_t n, float& mean, float& factor) const {
    double total = 0, squares = 0;
    if (model.centers)
      for (int64_t i = 0; i < n; i++) total += from[i];
    double middle = total / n;
    for (int64_t i = 0; i < n; i++) squares += (from[i] - middle) * (from[i] - middle);
    mean = (float)middle;
    factor = (float)(1.0 / std::sqrt(squares / n + model.epsilon));
  }

  void scale(const float* from, const Norm& norm, int64_t head, int64_t n, float mean,
             float factor, float* to) const {
    const T* weight = (const T*)norm.weight + head * norm.apart;
    const T* bias = norm.bias ? (const T*)norm.bias + head * norm.apart : nullptr;
    for (int64_t i = 0; i < n; i++)
      to[i] = (widen(weight[i]) + model.plus_one) * ((from[i] - mean) * factor) +
              (bias ? widen(bias[i]) : 0);
  }

  void normalize(const float* from, const Norm& norm, int64_t n, float* to) const {
    float mean, factor;
    measure(from, n, mean, factor);
    scale(from, norm, 0, n, mean, factor, to);
  }

  void prepare(Input& input, int64_t part, const Group& group, const float* from, const Norm* norm) {
    if (input.of == part) return;
    input.of = part;
    int64_t n = group.columns;
    input.x.resize(n);
    if (norm && norm->weight) normalize(from, *norm, n, input.x.data());
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

  void turn(int64_t index, float* x) const {
    int64_t half = call.turns / 2, step = model.in_pairs ? 2 : 1;
    int64_t across = model.in_pairs ? 1 : half;
    const float* cos = call.cos[index] + position * call.turns;
    const float* sin = call.sin[index] + position * call.turns;
    for (int64_t i = 0; i < half; i++) {
      int64_t at = i * step, other = at + across;
      float a = x[at], b = x[other];
      x[at] = a * cos[at] - b * sin[at];
      x[other] = b * cos[other] + a * sin[other];
    }
  }

  // A head of queries or keys, normalized and turned; all heads begin at `from`.
  void place(int64_t index, const float* from, int64_t heads, int64_t head, const Norm& norm,
             float* to) const {
    int64_t size = model.size;
    const float* own = from + head * size;
    bool is_later = model.turned && !model.over_all;
    float mean, factor;
    std::copy(own, own + size, to);
    if (norm.weight && !is_later) {
      if (model.over_all) measure(from, heads * size, mean, factor);
      else measure(own, size, mean, factor);
      scale(own, norm, head, size, mean, factor, to);
    }
    turn(index, to);
    if (norm.weight && is_later) {
      measure(to, size, mean, factor);
      scale(to, norm, head, size, mean, factor, to);
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
    place(index, qkv.data(), model.heads, head, layer.q_norm, q);
    place(index, qkv.data() + model.heads * size, model.groups, group, layer.k_norm, k);
    if (call.stretch)
      for (int64_t i = 0; i < size; i++) q[i] *= call.stretch[position];
    if (head % shared == 0)  // the others go on with their own copy of this token's
      for (int64_t i = 0; i < size; i++) {
        narrow(k[i], keys + position * size + i);
        narrow(v[i], values + position * size + i);
      }
    int64_t first = layer.window ? std::max<int64_t>(0, position + 1 - layer.window) : 0;
    float most = cap(dot(k, q, size) * model.scale, model.softcap);
    chances[position] = most;
    for (int64_t t = first; t < position; t++) {
      chances[t] = cap(dot(keys + t * size, q, size) * model.scale, model.softcap);
      most = std::max(most, chances[t]);
    }
    float total = 0;
    for (int64_t t = first; t <= position; t++) total += chances[t] = std::exp(chances[t] - most);
    float* out = attended.data() + head * size;
    for (int64_t i = 0; i < size; i += 16) {
      Wide a = multiply_add(load(v + i), fill(chances[position]), zero()), b = zero();
      int64_t t = first;
      for (; t + 2 <= position; t += 2) {
        a = multiply_add(load(values + t * size + i), fill(chances[t]), a);
        b = multiply_add(load(values + (t + 1) * size + i), fill(chances[t + 1]), b);
      }
      if (t < position) a = multiply_add(load(values + t * size + i), fill(chances[t]), a);
      store(out + i, multiply_add(add(a, b), fill(1 / total), zero()));
    }
  }

  // A block's product, normalized where its family does that, on top of the sum so far.
  void add_block(int64_t& part, const Group& group, const std::vector<float>& from,
                 const Norm& after, Input& input) {
    int64_t own = part++;
    rows(own, model.hidden, [&](int64_t begin, int64_t end) {
      prepare(input, own, group, from.data(), nullptr);
      for (int64_t at = begin; at < end; at++) {
        float value = multiply(group, input, 0, at);
        if (after.weight) delta[at] = value;
        else state[at] += value * model.residual;
      }
    });
    if (after.weight)
      share(parts[part++], 1, [&](int64_t) {
        normalize(delta.data(), after, model.hidden, delta.data());
        for (int64_t i = 0; i < model.hidden; i++) state[i] += delta[i] * model.residual;
      });
  }

  void open_gates(int64_t part, const Layer& layer, const Norm& norm, Input& input) {
    const Group& group = layer.gate_up;
    bool is_fused = group.count == 1;
    rows(part, model.intermediate, [&](int64_t begin, int64_t end) {
      prepare(input, part, group, state.data(), &norm);
      for (int64_t at = begin; at < end; at++) {
        float value = activate(multiply(group, input, 0, at));
        if (model.is_gated)
          value *= multiply(group, input, !is_fused, is_fused ? at + model.intermediate : at);
        gated[at] = value;
      }
    });
  }

  void run() {  // in every thread
    Input input;
    std::vector<float> room;
    int64_t part = 0;
    for (int64_t index = 0; index < model.count; index++) {
      const Layer& layer = model.layers[index];
      int64_t own = part++;
      rows(own, layer.qkv.rows, [&](int64_t begin, int64_t end) {
        prepare(input, own, layer.qkv, state.data(), &layer.before_attention);
        for (int64_t at = begin, which = 0, before = 0; at < end; at++) {
          while (at - before >= layer.qkv.parts[which].rows)
            before += layer.qkv.parts[which++].rows;
          qkv[at] = multiply(layer.qkv, input, which, at - before);
        }
      });
      // Where both blocks read the same, before the first of them adds to it.
      if (model.is_parallel) open_gates(part++, layer, layer.before_attention, input);
      share(parts[part++], model.heads, [&](int64_t head) { attend(index, head, room); });
      add_block(part, layer.out, attended, layer.after_attention, input);
      if (!model.is_parallel) open_gates(part++, layer, layer.before_mlp, input);
      add_block(part, layer.down, gated, layer.after_mlp, input);
    }
    bool is_normed = false;
    rows(part, model.vocabulary, [&](int64_t begin, int64_t end) {
      if (!is_normed) {
        input.x.resize(model.hidden);
        normalize(state.data(), model.norm, model.hidden, input.x.data());
        is_normed = true;
      }
      for (int64_t at = begin; at < end; at++) {
        float score = dot((const T*)model.head + at * model.hidden, input.x.data(), model.hidden);
        call.logits[at] = cap(score * model.logit_scale, model.logit_softcap);
      }
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
