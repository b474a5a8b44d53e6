// Barriers, warp collectives and atomics, as templates over the runtime's two meeting places.
#pragma once
#include "language.h"

inline void __syncthreads(KVC_HERE) { kvc::barrier(0, "__syncthreads", {file, line}); }
inline int __syncthreads_count(int p, KVC_HERE) { return kvc::barrier(p, "__syncthreads_count", {file, line}); }
inline int __syncthreads_or(int p, KVC_HERE) { return kvc::barrier(p, "__syncthreads_or", {file, line}) > 0; }
inline int __syncthreads_and(int p, KVC_HERE) {
    return kvc::barrier(p, "__syncthreads_and", {file, line}) == kvc::machine.threads;
}

namespace kvc {

inline int lane() { return machine.current->linear % WARP; }

template <class T>
inline const Slots& meet(unsigned mask, const T& value, const char* operation, Place place) {
    static_assert(sizeof(T) <= MAX_PAYLOAD, "too much for one warp collective");
    return exchange(mask, &value, sizeof(T), operation, place);
}

template <class T>
inline T value_of(const Slots& slots, int lane) {
    T value;
    memcpy(&value, slots.lane[lane], sizeof value);
    return value;
}

// Value of lane `source`; a lane outside the mask has nothing to give, on the GPU the result is then undefined.
template <class T>
inline T shuffled(unsigned mask, T value, int source, bool inside, const char* operation, Place place) {
    const Slots& slots = meet(mask, value, operation, place);
    if (!inside) return value;
    int lanes = machine.threads - machine.current->linear / WARP * WARP;
    if (!(mask >> source & 1) || source >= lanes)
        fail(place, "%s: lane %d reads lane %d, which is not in the mask %#x", operation, lane(), source, mask);
    return value_of<T>(slots, source);
}

// A power of two up to 32; groups of that many lanes shuffle among themselves.
inline int group_begin(int width, Place place) {
    if (width < 1 || width > WARP || (width & (width - 1))) fail(place, "shuffle: width %d is no power of two", width);
    return lane() & ~(width - 1);
}

template <class T, class Step>
inline T reduced(unsigned mask, T value, const char* operation, Place place, Step step) {
    const Slots& slots = meet(mask, value, operation, place);
    bool first = true;
    T result = value;
    for (int i = 0; i < WARP && machine.current->linear / WARP * WARP + i < machine.threads; ++i) {
        if (!(mask >> i & 1)) continue;
        T other = value_of<T>(slots, i);
        result = first ? other : step(result, other);
        first = false;
    }
    return result;
}

}  // namespace kvc

#define KVC_ALL_LANES 0xffffffffu
inline void __syncwarp(unsigned mask = KVC_ALL_LANES, KVC_HERE) { kvc::meet(mask, 0, "__syncwarp", {file, line}); }

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, KVC_HERE) {
    int begin = kvc::group_begin(width, {file, line});
    return kvc::shuffled(mask, value, begin | (source & (width - 1)), true, "__shfl_sync", {file, line});
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, KVC_HERE) {
    int begin = kvc::group_begin(width, {file, line}), source = kvc::lane() ^ bits;
    return kvc::shuffled(mask, value, source, source < begin + width, "__shfl_xor_sync", {file, line});
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, KVC_HERE) {
    int begin = kvc::group_begin(width, {file, line}), source = kvc::lane() + static_cast<int>(by);
    return kvc::shuffled(mask, value, source, source < begin + width, "__shfl_down_sync", {file, line});
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, KVC_HERE) {
    int begin = kvc::group_begin(width, {file, line}), source = kvc::lane() - static_cast<int>(by);
    return kvc::shuffled(mask, value, source, source >= begin, "__shfl_up_sync", {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, KVC_HERE) {
    unsigned bit = predicate ? 1u << kvc::lane() : 0u;
    return kvc::reduced(mask, bit, "__ballot_sync", {file, line}, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, KVC_HERE) {
    return kvc::reduced(mask, predicate != 0, "__any_sync", {file, line}, [](bool a, bool b) { return a || b; });
}
inline int __all_sync(unsigned mask, int predicate, KVC_HERE) {
    return kvc::reduced(mask, predicate != 0, "__all_sync", {file, line}, [](bool a, bool b) { return a && b; });
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, KVC_HERE) {
    const kvc::Slots& slots = kvc::meet(mask, value, "__match_any_sync", {file, line});
    unsigned same = 0;
    for (int i = 0; i < 32 && kvc::machine.current->linear / 32 * 32 + i < kvc::machine.threads; ++i)
        if (mask >> i & 1 && kvc::value_of<T>(slots, i) == value) same |= 1u << i;
    return same;
}

// sm_80 and later
#define KVC_REDUCE(name, type, expression)                                                              \
    inline type __reduce_##name##_sync(unsigned mask, type value, KVC_HERE) {                           \
        return kvc::reduced(mask, value, "__reduce_" #name "_sync", {file, line},                       \
                            [](type a, type b) { return expression; });                                 \
    }
KVC_REDUCE(add, int, a + b)
KVC_REDUCE(add, unsigned, a + b)
KVC_REDUCE(min, int, a < b ? a : b)
KVC_REDUCE(min, unsigned, a < b ? a : b)
KVC_REDUCE(max, int, a > b ? a : b)
KVC_REDUCE(max, unsigned, a > b ? a : b)
KVC_REDUCE(and, unsigned, a& b)
KVC_REDUCE(or, unsigned, a | b)
KVC_REDUCE(xor, unsigned, a ^ b)

inline void __threadfence() { kvc::fence(); }
inline void __threadfence_block() {}

// Atomics: threads change places only where they wait, so a plain read and write is one step. The two are not
// instrumented, since they would count as plain accesses.
template <class T, class Step>
__attribute__((noinline, no_sanitize("thread"))) T kvc_atomic(T* address, kvc::Place place, Step step) {
    kvc::check_access(address, sizeof(T), kvc::ATOMIC, place);
    T old, next;
    memcpy(&old, address, sizeof(T));
    next = step(old);
    memcpy(address, &next, sizeof(T));
    return old;
}
template <class T> struct kvc_same { using type = T; };
template <class T> using kvc_value = typename kvc_same<T>::type;
#define KVC_ATOMIC(name, expression)                                                        \
    template <class T>                                                                      \
    inline T name(T* address, kvc_value<T> value, KVC_HERE) {                               \
        return kvc_atomic(address, {file, line}, [=](T old) -> T { return expression; });   \
    }
KVC_ATOMIC(atomicAdd, old + value)
KVC_ATOMIC(atomicSub, old - value)
KVC_ATOMIC(atomicMin, value < old ? value : old)
KVC_ATOMIC(atomicMax, old < value ? value : old)
KVC_ATOMIC(atomicAnd, old& value)
KVC_ATOMIC(atomicOr, old | value)
KVC_ATOMIC(atomicXor, old ^ value)
KVC_ATOMIC(atomicExch, value)
KVC_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
template <class T>
inline T atomicCAS(T* address, kvc_value<T> expected, kvc_value<T> value, KVC_HERE) {
    return kvc_atomic(address, {file, line}, [=](T old) -> T { return old == expected ? value : old; });
}
