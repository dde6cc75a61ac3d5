// Quantization of grouped numbers on a CPU, in one pass over memory: the arithmetic of quant/reference.py, bit for bit.
//
// Every operation of the reference is one operation here, rounded as torch rounds it: in 16-bit types, computed in
// float32 and rounded after each. So no product and sum may be contracted (-ffp-contract=off), and no division may
// become a multiplication with a reciprocal. quant/kernels/cpu.py compiles this file and says what the fields mean.

#include <cmath>
#include <cstdint>
#include <cstring>

#define ALWAYS_INLINE inline __attribute__((always_inline))  // so that loops over a group know its size

namespace {

enum Kind { INTEGER, ASYMMETRIC, FLOATING };
enum Scale { GIVEN, PLAIN, E8M0, E4M3 };
enum Type { FLOAT32, BFLOAT16, FLOAT16 };

}  // namespace

struct Job {
    int64_t groups, size;           // how many share no scale, elements in each
    int32_t kind, scale, type;      // of the enums above; type: of the numbers that come in and of the values
    int32_t steps_in_type;          // whether each operation on elements is rounded to `type`
    int32_t quotient_type;          // type that a scale is rounded to when the largest magnitude has been divided
    int32_t mantissa, exponent_min; // of the element, where it is floating point
    int32_t exponent_max;           // of the element's largest number
    float low, high, half;          // ends of the element's range, and half its width
    float never_zero;               // scale in place of 0
    float reach;                    // where ranges end at the latest
    float zero;                     // what codes add to their values: 0 loses the sign of zeros, -0 keeps it
    int32_t threads;
};

namespace {

inline uint32_t bits(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float number(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

constexpr uint32_t SIGN = 0x80000000u, INFINITE = 0x7f800000u;

struct Bfloat16 { uint16_t pattern; };

inline float load(float x) { return x; }
inline float load(Bfloat16 x) { return number(uint32_t(x.pattern) << 16); }
inline float load(_Float16 x) { return float(x); }

template <class T> inline T store(float x) { return T(x); }
template <> inline Bfloat16 store<Bfloat16>(float x) {
    uint32_t u = bits(x);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return {uint16_t((u & ~SIGN) > INFINITE ? 0x7fc0 : rounded)};
}

template <class T> inline float rounded(float x) { return load(store<T>(x)); }
template <> inline float rounded<float>(float x) { return x; }

inline float in_type(float x, int type) {
    return type == BFLOAT16 ? rounded<Bfloat16>(x) : type == FLOAT16 ? rounded<_Float16>(x) : x;
}

// To `mantissa` bits, ties to even, in steps that no longer shrink below 2^exponent_min: adding and taking away
// 1.5 * 2^(exponent + 23 - mantissa) leaves what is a multiple of 2^(exponent - mantissa).
inline float to_float_grid(float x, int mantissa, int exponent_min) {
    uint32_t exponent = bits(x) & INFINITE, least = uint32_t(exponent_min + 127) << 23;
    exponent = exponent > least ? exponent : least;
    float shift = number((exponent + (uint32_t(23 - mantissa) << 23)) | 0x00400000u);
    float found = (x + shift) - shift;
    return number((bits(found) & ~SIGN) | (bits(x) & SIGN));
}

inline float clamped(float x, float low, float high) {  // NaN stays
    x = x < low ? low : x;
    return x > high ? high : x;
}

inline uint8_t float_code(float x, int mantissa, int exponent_min, int sign_bit) {
    uint32_t magnitude = bits(x) & ~SIGN, sign = bits(x) >> 31;
    uint32_t smallest_normal = uint32_t(exponent_min + 127) << 23;
    float per_step = number(uint32_t(127 + mantissa - exponent_min) << 23);
    uint32_t normal = (magnitude >> (23 - mantissa)) - (uint32_t(exponent_min + 126) << mantissa);
    uint32_t subnormal = uint32_t(int32_t(number(magnitude) * per_step));
    return uint8_t((magnitude < smallest_normal ? subnormal : normal) | (sign << sign_bit));
}

struct Range { uint32_t positive, negative; };  // bit patterns of the largest magnitude on each side of zero

// Magnitudes compare as their bit patterns do, and NaN as larger than infinity, so that it is found.
template <int KIND, class T> ALWAYS_INLINE Range range_of(const T* x, int64_t size) {
    if (KIND == ASYMMETRIC) {
        int32_t positive = 0, negative = 0;
        for (int64_t i = 0; i < size; i++) {
            int32_t up = int32_t(bits(load(x[i]))), down = int32_t(bits(load(x[i])) ^ SIGN);
            positive = up > positive ? up : positive;
            negative = down > negative ? down : negative;
        }
        return {uint32_t(positive), uint32_t(negative)};
    }
    uint32_t largest = 0;
    for (int64_t i = 0; i < size; i++) {
        uint32_t magnitude = bits(load(x[i])) & ~SIGN;
        largest = magnitude > largest ? magnitude : largest;
    }
    return {largest, 0};
}

inline Range united(Range a, Range b) {
    return {a.positive > b.positive ? a.positive : b.positive, a.negative > b.negative ? a.negative : b.negative};
}

constexpr int64_t BLOCK = 64, CHUNK = 16384;

struct Step { float used, zero_point; };  // a scale as it divides, and the zero point

struct Steps {  // of a block of groups: each loop over them is one of the vector unit's
    float low[BLOCK], high[BLOCK], stored[BLOCK], used[BLOCK], zero_point[BLOCK];
};

template <class T> inline void round_all(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] = rounded<T>(x[i]);
}

inline void round_all(float* x, int64_t count, int type) {
    if (type == BFLOAT16) round_all<Bfloat16>(x, count);
    if (type == FLOAT16) round_all<_Float16>(x, count);
}

// From `low` and `high` all the rest.
template <int KIND> void find_steps(const Job& job, Steps& at, int64_t count, float global_scale) {
    const int type = job.steps_in_type ? job.type : FLOAT32;
    const float never_zero = job.never_zero, zero = job.zero, least = job.low, most = job.high, half = job.half;
    if (KIND == ASYMMETRIC) {
        for (int64_t i = 0; i < count; i++) at.stored[i] = at.high[i] - at.low[i];
        round_all(at.stored, count, type);
        for (int64_t i = 0; i < count; i++) at.stored[i] = at.stored[i] / (most - least);
        round_all(at.stored, count, job.quotient_type);
        for (int64_t i = 0; i < count; i++) at.zero_point[i] = at.low[i] / at.stored[i];
        round_all(at.zero_point, count, type);
        for (int64_t i = 0; i < count; i++) at.zero_point[i] = least - at.zero_point[i];
        round_all(at.zero_point, count, type);
        for (int64_t i = 0; i < count; i++) {
            float point = clamped(at.zero_point[i], least, most);
            at.zero_point[i] = std::rint(point != point ? 0.0f : point) + zero;
            at.stored[i] = at.used[i] = at.stored[i] == 0 ? never_zero : at.stored[i];
        }
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        at.zero_point[i] = 0;
        at.stored[i] = at.high[i] > -at.low[i] ? at.high[i] : -at.low[i];
    }
    if (job.scale == E8M0) {
        for (int64_t i = 0; i < count; i++) {
            float largest = at.stored[i] != at.stored[i] ? NAN : at.stored[i];
            int32_t power = int32_t(((bits(largest) + (1u << 21)) & INFINITE) >> 23) - job.exponent_max;
            power = power < 0 ? 0 : power > 254 ? 254 : power;
            at.stored[i] = float(power);
            at.used[i] = number(power == 0 ? 0x00400000u : uint32_t(power) << 23);
        }
        round_all(at.used, count, type);
        for (int64_t i = 0; i < count; i++) at.used[i] = at.used[i] == 0 ? 1.0f : at.used[i];
        return;
    }
    for (int64_t i = 0; i < count; i++) at.stored[i] = at.stored[i] / half;
    round_all(at.stored, count, job.quotient_type);
    if (job.scale == E4M3) {
        for (int64_t i = 0; i < count; i++) {
            float scale = global_scale * at.stored[i];
            scale = to_float_grid(scale > 448.0f ? 448.0f : scale, 3, -6);
            at.stored[i] = scale == 0 ? 0.125f : scale;
            at.used[i] = at.stored[i] / global_scale;
        }
        return;
    }
    for (int64_t i = 0; i < count; i++) at.stored[i] = at.used[i] = at.stored[i] == 0 ? never_zero : at.stored[i];
}

// What leaves: values in the type of the input, or codes, or both; either may be null.
template <int KIND, bool STEPS, class T>
ALWAYS_INLINE void convert(const Job& job, const T* __restrict x, T* __restrict values, uint8_t* __restrict codes,
                           int64_t size, Step step) {
    const float low = job.low, high = job.high, scale = step.used, point = step.zero_point, zero = job.zero;
    const int mantissa = job.mantissa, exponent_min = job.exponent_min;
    const int sign_bit = mantissa == 1 ? 3 : 7;
    auto held = [=](T number) {
        float v = load(number) / scale;
        if (STEPS) v = rounded<T>(v);
        if (KIND == ASYMMETRIC) {
            v = v + point;
            if (STEPS) v = rounded<T>(v);
        }
        v = clamped(v, low, high);
        return KIND == FLOATING ? to_float_grid(v, mantissa, exponent_min) : std::rint(v) + zero;
    };
    auto value = [=](float v) {
        if (KIND == ASYMMETRIC) {
            v = v - point;
            if (STEPS) v = rounded<T>(v);
        }
        return store<T>(v * scale);
    };
    auto code = [=](float v) {
        return KIND == FLOATING ? float_code(v, mantissa, exponent_min, sign_bit) : uint8_t(int8_t(int32_t(v)));
    };
    if (!codes) {
        for (int64_t i = 0; i < size; i++) values[i] = value(held(x[i]));
    } else if (!values) {
        for (int64_t i = 0; i < size; i++) codes[i] = code(held(x[i]));
    } else {
        for (int64_t i = 0; i < size; i++) {
            float v = held(x[i]);
            values[i] = value(v);
            codes[i] = code(v);
        }
    }
}

struct Places {
    const void* x;
    const float *low, *high;   // a range for each group in place of its own, or null
    const float* global_scale; // one number
    void* values;              // in the type of x, or null
    uint8_t* codes;            // or null
    float* scales;             // stored, one a group; given where `scale` says so (then one for all); or null
    float* zero_points;        // likewise
};

// SIZE: elements of a group where the compiler is to know them, else 0.
template <int KIND, bool STEPS, class T, int SIZE> uint32_t run(const Job& job, const Places& at) {
    const T* x = static_cast<const T*>(at.x);
    T* values = static_cast<T*>(at.values);
    const int64_t size = SIZE ? SIZE : job.size, groups = job.groups;
    const float global_scale = at.global_scale ? *at.global_scale : 1.0f;
    auto part = [=](auto* place, int64_t offset) { return place ? place + offset : place; };
    auto bounded = [&](Steps& steps, int64_t place, int64_t group, Range range) {
        float high = number(range.positive), low = KIND == ASYMMETRIC ? -number(range.negative) : -high;
        if (at.low) low = at.low[group], high = at.high[group];
        low = clamped(low, -job.reach, 0), high = clamped(high, 0, job.reach);
        if (low != low || high != high) low = high = NAN;
        steps.low[place] = low, steps.high[place] = high;
    };
    auto found_steps = [&](Steps& steps, int64_t first, int64_t count) {
        find_steps<KIND>(job, steps, count, global_scale);
        if (at.scales) std::memcpy(at.scales + first, steps.stored, count * sizeof(float));
        if (at.zero_points) std::memcpy(at.zero_points + first, steps.zero_point, count * sizeof(float));
    };
    uint32_t largest = 0;  // NaN and infinity show here

    const bool given = job.scale == GIVEN;
    if (given || (SIZE == 0 && size > 2 * CHUNK && groups < 4 * job.threads)) {  // few scales: threads share each
        const int64_t each = given ? groups * size : size, chunks = (each + CHUNK - 1) / CHUNK;
        for (int64_t group = 0; group < (given ? 1 : groups); group++) {
            const T* start = x + group * size;
            Step step;
            if (given) {
                float point = at.zero_points ? at.zero_points[0] : 0.0f;
                step = {at.scales[0], point};
            } else {
                uint32_t positive = 0, negative = 0;
#pragma omp parallel for num_threads(job.threads) reduction(max : positive, negative)
                for (int64_t chunk = 0; chunk < chunks; chunk++) {
                    int64_t from = chunk * CHUNK, count = each - from < CHUNK ? each - from : CHUNK;
                    Range found = united({positive, negative}, range_of<KIND>(start + from, count));
                    positive = found.positive, negative = found.negative;
                }
                Range range{positive, negative};
                largest = united({largest, 0}, {positive > negative ? positive : negative, 0}).positive;
                Steps steps;
                bounded(steps, 0, group, range);
                found_steps(steps, group, 1);
                step = {steps.used[0], steps.zero_point[0]};
            }
#pragma omp parallel for num_threads(job.threads)
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                int64_t from = chunk * CHUNK, count = each - from < CHUNK ? each - from : CHUNK;
                int64_t offset = group * size + from;
                convert<KIND, STEPS>(job, x + offset, part(values, offset), part(at.codes, offset), count, step);
            }
        }
        return largest;
    }

    const int64_t wanted = CHUNK / size, together = wanted < 1 ? 1 : wanted > BLOCK ? BLOCK : wanted;
    const int64_t blocks = (groups + together - 1) / together;
#pragma omp parallel for num_threads(job.threads) reduction(max : largest)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * together, count = groups - first < together ? groups - first : together;
        Steps steps;
        for (int64_t g = 0; g < count; g++) {
            Range range = range_of<KIND>(x + (first + g) * size, size);
            uint32_t found = united(range, {range.negative, 0}).positive;
            largest = found > largest ? found : largest;
            bounded(steps, g, first + g, range);
        }
        found_steps(steps, first, count);
        for (int64_t g = 0; g < count; g++) {
            int64_t offset = (first + g) * size;
            Step step{steps.used[g], steps.zero_point[g]};
            convert<KIND, STEPS>(job, x + offset, part(values, offset), part(at.codes, offset), size, step);
        }
    }
    return largest;
}

template <int KIND, bool STEPS, class T> uint32_t sized(const Job& job, const Places& at) {
    if (job.scale != GIVEN && job.size == 16) return run<KIND, STEPS, T, 16>(job, at);
    if (job.scale != GIVEN && job.size == 32) return run<KIND, STEPS, T, 32>(job, at);
    return run<KIND, STEPS, T, 0>(job, at);
}

template <int KIND> uint32_t typed(const Job& job, const Places& at) {
    if (job.type == BFLOAT16) {
        return job.steps_in_type ? sized<KIND, true, Bfloat16>(job, at) : sized<KIND, false, Bfloat16>(job, at);
    }
    if (job.type == FLOAT16) {
        return job.steps_in_type ? sized<KIND, true, _Float16>(job, at) : sized<KIND, false, _Float16>(job, at);
    }
    return sized<KIND, false, float>(job, at);
}

}  // namespace

// Returns the bit pattern of the largest magnitude, as float32; 0 where scales are given.
extern "C" uint32_t convert_groups(const Job* job, const Places* at) {
    if (job->kind == FLOATING) return typed<FLOATING>(*job, *at);
    if (job->kind == ASYMMETRIC) return typed<ASYMMETRIC>(*job, *at);
    return typed<INTEGER>(*job, *at);
}

extern "C" uint32_t largest_magnitude(const Job* job, const void* x) {
    auto search = [job](const auto* start) {
        const int64_t size = job->groups * job->size, chunks = (size + CHUNK - 1) / CHUNK;
        uint32_t largest = 0;
#pragma omp parallel for num_threads(job->threads) reduction(max : largest)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            int64_t from = chunk * CHUNK, count = size - from < CHUNK ? size - from : CHUNK;
            uint32_t found = range_of<INTEGER>(start + from, count).positive;
            largest = found > largest ? found : largest;
        }
        return largest;
    };
    if (job->type == BFLOAT16) return search(static_cast<const Bfloat16*>(x));
    if (job->type == FLOAT16) return search(static_cast<const _Float16*>(x));
    return search(static_cast<const float*>(x));
}
