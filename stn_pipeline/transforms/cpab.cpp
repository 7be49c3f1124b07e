// The flow of cpab.py and its gradients, for CELLS x CELLS squares and STEPS steps, all floats: an image a thread, its
// points in lanes. The backward pass goes forward again, keeping where each velocity was asked for, and then back.
// Sums run in an order that does not depend on the number of threads.
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr int T = 4 * CELLS * CELLS, LANES = 16, VECTORS = (T + LANES - 1) / LANES, STAGES = 3;
// of a step: how far each velocity carries to where the next is asked for, and its share of the way
constexpr float REACH[STAGES - 1] = {1.0f / 2 / STEPS, 3.0f / 4 / STEPS}, SHARE[STAGES] = {2.0f / 9 / STEPS, 3.0f / 9 / STEPS, 4.0f / 9 / STEPS};

typedef float floats __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));

struct Fields {  // of one image: for each of the six coefficients of a map, those of all triangles
  floats at[6][VECTORS + VECTORS % 2];
  explicit Fields(const float* maps) {
    memset(at, 0, sizeof at);
    for (int k = 0; k < 6; k++) memcpy(at[k], maps + k * T, T * sizeof(float));
  }
  floats of(int k, ints which) const {
#ifdef __AVX512F__  // two vectors are searched at once, in registers
    floats found = (floats)_mm512_permutex2var_ps((__m512)at[k][0], (__m512i)which, (__m512)at[k][1]);
    for (int v = 2; v < VECTORS; v += 2) {
      floats further = (floats)_mm512_permutex2var_ps((__m512)at[k][v], (__m512i)which, (__m512)at[k][v + 1]);
      found = which >= LANES * v ? further : found;
    }
    return found;
#else
    floats found;
    for (int l = 0; l < LANES; l++) found[l] = ((const float*)at[k])[which[l]];
    return found;
#endif
  }
};

struct Asked {  // where velocities were asked for: pulled inside, in which triangle, and whether x and y were inside
  floats x, y;
  ints which, x_is_free, y_is_free;
};

static inline floats inside(floats x) {  // NaN stays
  x = x < -1 ? floats{} - 1 : x;
  return x > 1 ? floats{} + 1 : x;
}

static inline ints square(floats& x) {  // the square's number along an axis; x becomes the place from its middle, -0.5 to 0.5
  floats place = ((x > -1 ? x : floats{} - 1) + 1) * (CELLS / 2.0f);  // NaN has no place: any will do
  ints number = __builtin_convertvector(place, ints);
  number = number > CELLS - 1 ? ints{} + (CELLS - 1) : number;
  x = place - __builtin_convertvector(number, floats) - 0.5f;
  return number;
}

static inline void velocity(const Fields& f, floats x, floats y, floats& vx, floats& vy, Asked& asked) {
  asked.x = inside(x), asked.y = inside(y);
  asked.x_is_free = asked.x == x, asked.y_is_free = asked.y == y;
  x = asked.x, y = asked.y;
  ints column = square(x), row = square(y);
  asked.which = 4 * (CELLS * row + column) - (x > y) - 2 * (x > -y);  // true is -1
  vx = f.of(0, asked.which) * asked.x + f.of(1, asked.which) * asked.y + f.of(2, asked.which);
  vy = f.of(3, asked.which) * asked.x + f.of(4, asked.which) * asked.y + f.of(5, asked.which);
}

static inline void travel(const Fields& f, floats& x, floats& y, Asked* asked) {
  for (int step = 0; step < STEPS; step++, asked += STAGES) {
    floats kx[STAGES], ky[STAGES];
    velocity(f, x, y, kx[0], ky[0], asked[0]);
    for (int k = 1; k < STAGES; k++) velocity(f, x + REACH[k - 1] * kx[k - 1], y + REACH[k - 1] * ky[k - 1], kx[k], ky[k], asked[k]);
    for (int k = 0; k < STAGES; k++) x += SHARE[k] * kx[k], y += SHARE[k] * ky[k];
  }
}

// The gradient (gx, gy) of a velocity: its share of the maps is added up, that of the point is returned in its place.
static inline void pull_back(const Fields& f, const Asked& asked, floats& gx, floats& gy, float (*maps)[8], int n) {
  floats shares[6] = {gx * asked.x, gx * asked.y, gx, gy * asked.x, gy * asked.y, gy};
  for (int l = 0; l < n; l++) {
    float* map = maps[asked.which[l]];
    for (int k = 0; k < 6; k++) map[k] += shares[k][l];
  }
  floats x = f.of(0, asked.which) * gx + f.of(3, asked.which) * gy, y = f.of(1, asked.which) * gx + f.of(4, asked.which) * gy;
  gx = asked.x_is_free ? x : floats{}, gy = asked.y_is_free ? y : floats{};
}

static inline void go_back(const Fields& f, const Asked* asked, floats& gx, floats& gy, float (*maps)[8], int n) {
  for (int step = STEPS; step-- > 0;) {
    floats sx = gx, sy = gy, ax{}, ay{};  // gradients of the step's start, and of the velocity at hand
    for (int k = STAGES; k-- > 0;) {
      float reach = k < STAGES - 1 ? REACH[k] : 0;
      ax = SHARE[k] * gx + reach * ax, ay = SHARE[k] * gy + reach * ay;
      pull_back(f, asked[STAGES * step + k], ax, ay, maps, n);
      sx += ax, sy += ay;
    }
    gx = sx, gy = sy;
  }
}

static inline int gather(const float* points, int64_t first, int64_t n, floats& x, floats& y) {
  int m = n - first < LANES ? (int)(n - first) : LANES;
  for (int l = 0; l < LANES; l++) {
    int64_t at = first + (l < m ? l : 0);
    x[l] = points[2 * at], y[l] = points[2 * at + 1];
  }
  return m;
}

static inline void scatter(float* points, int64_t first, int m, floats x, floats y) {
  for (int l = 0; l < m; l++) points[2 * (first + l)] = x[l], points[2 * (first + l) + 1] = y[l];
}

extern "C" {

// maps: (B, 6, T).  points: (N, 2) where shared, else (B, N, 2).  moved: (B, N, 2).
void forward(const float* maps, const float* points, float* moved, int64_t B, int64_t N, int shared, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t b = 0; b < B; b++) {
    Fields f(maps + b * T * 6);
    Asked asked[STAGES * STEPS];
    floats x, y;
    for (int64_t first = 0; first < N; first += LANES) {
      int m = gather(points + (shared ? 0 : 2 * b * N), first, N, x, y);
      travel(f, x, y, asked);
      scatter(moved + 2 * b * N, first, m, x, y);
    }
  }
}

// of_moved: (B, N, 2).  of_maps: (B, 6, T).  of_points: (B, N, 2), or nothing where it is not wanted.
void backward(const float* of_moved, const float* maps, const float* points, float* of_maps, float* of_points, int64_t B, int64_t N,
              int shared, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t b = 0; b < B; b++) {
    Fields f(maps + b * T * 6);
    Asked asked[STAGES * STEPS];
    floats x, y, gx, gy;
    float sums[T][8];
    memset(sums, 0, sizeof sums);
    for (int64_t first = 0; first < N; first += LANES) {
      int m = gather(points + (shared ? 0 : 2 * b * N), first, N, x, y);
      travel(f, x, y, asked);
      gather(of_moved + 2 * b * N, first, N, gx, gy);
      go_back(f, asked, gx, gy, sums, m);
      if (of_points) scatter(of_points + 2 * b * N, first, m, gx, gy);
    }
    for (int k = 0; k < 6; k++)
      for (int t = 0; t < T; t++) of_maps[(6 * b + k) * T + t] = sums[t][k];
  }
}
}
