// relu(max_pool2d(conv2d(x, w, bias), 2)) and its gradients, for one geometry: C channels in, O out, a KxK kernel, HxW
// images, all floats. Compiled by model/native.py with these five as macros, so that every inner loop has a known length.
//
// Forward: sixteen images lie side by side in the lanes of vectors, and the four convolutions under a pooled pixel are
// summed in registers, so the unpooled map is never written.
// Backward: of those four only the largest has a gradient. So it is a sum over pooled pixels, one window each: a quarter
// of the products that the convolution's own gradient takes. Lanes are neighbours in a row of pixels, channels last.
// Sums run in an order that does not depend on the number of threads.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define UNROLL _Pragma("GCC unroll 32")

#ifdef __AVX512F__
constexpr int V = 16, REGISTERS = 32;
#else
constexpr int V = 8, REGISTERS = 16;
#endif

template <int N> struct Lanes {
  typedef float floats __attribute__((vector_size(N * 4)));
  typedef int32_t ints __attribute__((vector_size(N * 4)));
  typedef uint8_t bytes __attribute__((vector_size(N)));
};
template <class T> static inline T load(const void* from) {  // unaligned
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}
template <class T> static inline void store(void* to, T value) { memcpy(to, &value, sizeof value); }

constexpr int up(int n, int step) { return (n + step - 1) / step * step; }
constexpr int least(int a, int b) { return a < b ? a : b; }

template <class T> struct Buffer {  // zeroed, of whole cache lines
  T* data;
  explicit Buffer(int64_t n) {
    size_t bytes = (n * sizeof(T) + 127) / 64 * 64;
    data = (T*)aligned_alloc(64, bytes);
    if (!data) abort();
    memset(data, 0, bytes);
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
};

constexpr int CHUNK = 16;  // images in lanes
constexpr int PH = (H - K + 1) / 2, PW = (W - K + 1) / 2, P = PH * PW;
constexpr int IMAGE = C * H * W, POOLED = O * P;
constexpr uint8_t OFF = 4;  // in `which`: the rectifier let nothing through; otherwise 2·row + column of the largest
static_assert(PH > 0 && PW > 0, "the image is smaller than kernel and pool");

// ---- forward

constexpr int n_groups(int group) { return (O + group - 1) / group; }
constexpr int choose_group() {  // output channels summed at once: four sums each, few left over
  int best = 1, best_cost = 1 << 30;
  for (int group = 1; 4 * group <= REGISTERS - 4; group++) {
    int cost = n_groups(group) * (16 * group + 3);  // 3: what loading an input costs beside the sums
    if (cost <= best_cost) best = group, best_cost = cost;
  }
  return best;
}
constexpr int GROUP = choose_group(), GROUPS = n_groups(GROUP);

template <int N, class T> static void to_lanes(const T* images, T* lanes, int n) {
  for (int first = 0; first < N; first += 16)
    for (int b = 0; b < CHUNK; b++)
      for (int i = first; i < least(first + 16, N); i++) lanes[i * CHUNK + b] = b < n ? images[b * N + i] : 0;
}
template <int N, class T> static void from_lanes(const T* lanes, T* images, int n) {
  for (int first = 0; first < N; first += 16)
    for (int b = 0; b < n; b++)
      for (int i = first; i < least(first + 16, N); i++) images[b * N + i] = lanes[i * CHUNK + b];
}

static void forward_chunk(const float* x, const float* kernels, const float* bias, float* y, uint8_t* which, int n) {
  typedef Lanes<V>::floats floats;
  typedef Lanes<V>::ints ints;
  static thread_local Buffer<float> x_lanes(IMAGE * CHUNK), y_lanes(POOLED * CHUNK);
  static thread_local Buffer<uint8_t> which_lanes(POOLED * CHUNK);
  to_lanes<IMAGE>(x, x_lanes.data, n);
  for (int lane = 0; lane < CHUNK; lane += V)
    for (int group = 0; group < GROUPS; group++)
      for (int p = 0; p < P; p++) {
        floats sum[4][GROUP];
        UNROLL for (int o = 0; o < GROUP; o++)
          UNROLL for (int q = 0; q < 4; q++) sum[q][o] = floats{} + bias[group * GROUP + o];
        for (int c = 0; c < C; c++) {
          const float* corner = x_lanes.data + ((c * H + 2 * (p / PW)) * W + 2 * (p % PW)) * CHUNK + lane;
          const float* kernel = kernels + (group * C + c) * K * K * GROUP;
          UNROLL for (int iy = 0; iy <= K; iy++)
            UNROLL for (int ix = 0; ix <= K; ix++) {
              floats value = load<floats>(corner + (iy * W + ix) * CHUNK);
              UNROLL for (int q = 0; q < 4; q++) {
                int ky = iy - q / 2, kx = ix - q % 2;
                if (ky < 0 || ky >= K || kx < 0 || kx >= K) continue;
                UNROLL for (int o = 0; o < GROUP; o++) sum[q][o] += value * kernel[(ky * K + kx) * GROUP + o];
              }
            }
        }
        for (int o = group * GROUP; o < least((group + 1) * GROUP, O); o++) {
          floats(*mine) = sum[0] + (o - group * GROUP);
          floats largest = mine[0];
          ints at = {};
          for (int q = 1; q < 4; q++) {
            floats other = mine[q * GROUP];
            ints wins = (other > largest) | (other != other);  // the first of equals; NaN is passed on, as torch does
            largest = wins ? other : largest;
            at = wins ? ints{} + q : at;
          }
          ints off = largest <= 0;
          int to = (o * P + p) * CHUNK + lane;
          store(y_lanes.data + to, off ? floats{} : largest);
          store(which_lanes.data + to, __builtin_convertvector(off ? ints{} + OFF : at, Lanes<V>::bytes));
        }
      }
  from_lanes<POOLED>(y_lanes.data, y, n);
  from_lanes<POOLED>(which_lanes.data, which, n);
}

// x (n, C, H, W), w (O, C, K, K), bias (O,) -> y (n, O, PH, PW), and `which` of the same shape for the way back.
extern "C" void forward(const float* x, const float* w, const float* bias, float* y, uint8_t* which, int64_t n, int threads) {
  Buffer<float> kernels(GROUPS * C * K * K * GROUP), biases(GROUPS * GROUP);
  memcpy(biases.data, bias, O * sizeof(float));
  for (int o = 0; o < O; o++)
    for (int c = 0; c < C; c++)
      for (int k = 0; k < K * K; k++)
        kernels.data[((o / GROUP * C + c) * K * K + k) * GROUP + o % GROUP] = w[(o * C + c) * K * K + k];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < n; first += CHUNK)
    forward_chunk(x + first * IMAGE, kernels.data, biases.data, y + first * POOLED, which + first * POOLED, least(CHUNK, n - first));
}

// ---- backward

constexpr int PIXEL = C < 8 ? C : up(C, 8);  // floats a pixel in the image that kernels are summed over: rows begin aligned
constexpr int KL = K * PIXEL <= 8 ? 8 : V, KV = up(K * PIXEL, KL) / KL;              // lanes, vectors of a kernel's row
constexpr int WL = (K + 1) * C <= 8 ? 8 : V, WV = up((K + 1) * C, WL) / WL;          // lanes, vectors of a window's row
constexpr int rows_at_once(int rows, int vectors) {
  int most = (REGISTERS - 4) / vectors;
  return most < 1 ? 1 : least(most, rows);
}
constexpr int KERNEL_ROWS = rows_at_once(K, KV), WINDOW_ROWS = rows_at_once(K + 1, WV);
constexpr int KERNEL = K * KV * KL, WINDOW = (K + 1) * WV * WL;
constexpr int SUMS = up(O * KERNEL + O, 16);  // floats of a gradient of kernels and biases
constexpr int MOST_PARTS = 32;

// Add an image's share to the gradients of kernels (O, K, KV·KL) and biases (O,).
static void add_kernels(const float* gradient, const uint8_t* which, const float* pixels, float* kernels, float* biases, const int* live, int n_live) {
  typedef Lanes<KL>::floats floats;
  const int shift[5] = {0, PIXEL, W * PIXEL, W * PIXEL + PIXEL, 0};
  for (int j = 0; j < n_live; j++) {
    int o = live[j];
    for (int p = o * P; p < (o + 1) * P; p++) biases[o] += which[p] == OFF ? 0 : gradient[p];
    for (int top = 0; top < K; top += KERNEL_ROWS) {
      float* out = kernels + o * KERNEL + top * KV * KL;
      floats sum[KERNEL_ROWS][KV];
      UNROLL for (int ky = 0; ky < KERNEL_ROWS; ky++)
        UNROLL for (int v = 0; v < KV; v++)
          if (top + ky < K) sum[ky][v] = load<floats>(out + (ky * KV + v) * KL);
      for (int oy = 0, p = o * P; oy < PH; oy++)
        for (int ox = 0; ox < PW; ox++, p++) {
          int q = which[p];
          if (C > 1 && q == OFF) continue;  // with one channel the branch costs more than the sums
          float g = q == OFF ? 0 : gradient[p];
          const float* from = pixels + ((2 * oy + top) * W + 2 * ox) * PIXEL + shift[q];
          UNROLL for (int ky = 0; ky < KERNEL_ROWS; ky++)
            UNROLL for (int v = 0; v < KV; v++)
              if (top + ky < K) sum[ky][v] += g * load<floats>(from + ky * W * PIXEL + v * KL);
        }
      UNROLL for (int ky = 0; ky < KERNEL_ROWS; ky++)
        UNROLL for (int v = 0; v < KV; v++)
          if (top + ky < K) store(out + (ky * KV + v) * KL, sum[ky][v]);
    }
  }
}

// Write the gradient of an image, (H, W, C). `windows` (4, O, K + 1, WV·WL): each kernel at its four places in a window.
static void image_gradient(const float* gradient, const uint8_t* which, const float* windows, float* image, const int* live, int n_live) {
  typedef Lanes<WL>::floats floats;
  memset(image, 0, H * W * C * sizeof(float));
  for (int oy = 0; oy < PH; oy++)
    for (int ox = 0; ox < PW; ox++)
      for (int top = 0; top <= K; top += WINDOW_ROWS) {
        floats sum[WINDOW_ROWS][WV];
        UNROLL for (int i = 0; i < WINDOW_ROWS; i++)
          UNROLL for (int v = 0; v < WV; v++) sum[i][v] = floats{};
        for (int j = 0; j < n_live; j++) {
          int o = live[j], p = o * P + oy * PW + ox, q = which[p];
          if (C > 1 && q == OFF) continue;
          float g = q == OFF ? 0 : gradient[p];
          const float* window = windows + ((q & 3) * O + o) * WINDOW + top * WV * WL;
          UNROLL for (int i = 0; i < WINDOW_ROWS; i++)
            UNROLL for (int v = 0; v < WV; v++)
              if (top + i <= K) sum[i][v] += g * load<floats>(window + (i * WV + v) * WL);
        }
        float* out = image + ((2 * oy + top) * W + 2 * ox) * C;
        UNROLL for (int i = 0; i < WINDOW_ROWS; i++)
          UNROLL for (int v = 0; v < WV; v++)
            if (top + i <= K) {
              float* to = out + i * W * C + v * WL;
              store(to, load<floats>(to) + sum[i][v]);
            }
      }
}

// The gradients of y (n, O, PH, PW) -> of x, unless it is null, of w and of bias.
extern "C" void backward(const float* gy, const uint8_t* which, const float* x, const float* w, float* gx, float* gw, float* gbias, int64_t n, int threads) {
  int64_t parts = n < MOST_PARTS * 4 ? (n + 3) / 4 : MOST_PARTS;  // of the batch, each with sums of its own
  Buffer<float> sums(parts * SUMS), windows(gx ? 4 * O * WINDOW : 0);
  if (gx)
    for (int q = 0; q < 4; q++)
      for (int o = 0; o < O; o++)
        for (int c = 0; c < C; c++)
          for (int k = 0; k < K * K; k++)
            windows.data[(q * O + o) * WINDOW + (k / K + q / 2) * WV * WL + (k % K + q % 2) * C + c] = w[(o * C + c) * K * K + k];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < parts; part++) {
    static thread_local Buffer<float> pixels(H * W * PIXEL + KV * KL), image(H * W * C + WV * WL);
    float* kernels = sums.data + part * SUMS;
    for (int64_t b = part * n / parts; b < (part + 1) * n / parts; b++) {
      const float *xb = x + b * IMAGE, *gb = gy + b * POOLED;
      int live[O], n_live = 0;  // a channel that dropout took has no gradient at all
      for (int o = 0; o < O; o++) {
        bool any = false;
        for (int p = o * P; p < (o + 1) * P; p++) any |= gb[p] != 0;
        live[n_live] = o;
        n_live += any;
      }
      for (int c = 0; c < C; c++)
        for (int k = 0; k < H * W; k++) pixels.data[k * PIXEL + c] = xb[c * H * W + k];
      add_kernels(gb, which + b * POOLED, pixels.data, kernels, kernels + O * KERNEL, live, n_live);
      if (!gx) continue;
      image_gradient(gb, which + b * POOLED, windows.data, image.data, live, n_live);
      for (int c = 0; c < C; c++)
        for (int k = 0; k < H * W; k++) gx[b * IMAGE + c * H * W + k] = image.data[k * C + c];
    }
  }
  for (int o = 0; o < O; o++) {
    gbias[o] = 0;
    for (int64_t part = 0; part < parts; part++) gbias[o] += sums.data[part * SUMS + O * KERNEL + o];
    for (int c = 0; c < C; c++)
      for (int k = 0; k < K * K; k++) {
        float sum = 0;
        for (int64_t part = 0; part < parts; part++) sum += sums.data[part * SUMS + o * KERNEL + k / K * KV * KL + k % K * PIXEL + c];
        gw[(o * C + c) * K * K + k] = sum;
      }
  }
}
