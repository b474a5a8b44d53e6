// Everything that a kernel compiled for the CPU sees, and the two functions that the driver made by build.py exports.
#pragma once
#include <tuple>
#include <type_traits>
#include <utility>

#include "collectives.h"
#include "numbers.h"

namespace kvc {

// What build.py checks arguments by: p pointer, c pointer to const, i 32 bits, l 64 bits, f float, ? anything else.
template <class T>
constexpr char kind() {
    if (std::is_pointer<T>::value) return std::is_const<std::remove_pointer_t<T>>::value ? 'c' : 'p';
    if (std::is_same<T, float>::value) return 'f';
    if (std::is_integral<T>::value) return sizeof(T) == 4 ? 'i' : sizeof(T) == 8 ? 'l' : '?';
    return '?';
}

template <class... A>
const char* kinds(void (*)(A...)) {
    static const char text[] = {kind<A>()..., 0};
    return text;
}

// The arguments lie in Python's memory, which kernels may not read; these functions may.
template <class... A, size_t... I>
__attribute__((no_sanitize("thread"))) void apply(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
}

template <class... A>
__attribute__((no_sanitize("thread"))) void enter_kernel(void (*kernel)(A...), void** arguments) {
    apply(kernel, arguments, std::index_sequence_for<A...>{});
}

}  // namespace kvc

// Bounds of the section of __shared__ variables; the linker makes them, unless there are none.
extern "C" unsigned char __start_kvc_shared[] __attribute__((weak, visibility("hidden")));
extern "C" unsigned char __stop_kvc_shared[] __attribute__((weak, visibility("hidden")));
extern "C" __attribute__((visibility("default"), no_sanitize("thread"))) void kvc_static_shared(uintptr_t* bounds) {
    bounds[0] = reinterpret_cast<uintptr_t>(__start_kvc_shared);
    bounds[1] = reinterpret_cast<uintptr_t>(__stop_kvc_shared);
}

#define KVC_EXPORT(name)                                                                              \
    extern "C" __attribute__((visibility("default"), no_sanitize("thread"))) void kvc_enter_##name(void** arguments) {       \
        kvc::enter_kernel(&name, arguments);                                                          \
    }                                                                                                 \
    extern "C" __attribute__((visibility("default"))) const char* kvc_kinds_##name() { return kvc::kinds(&name); }
