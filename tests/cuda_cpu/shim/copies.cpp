// Asynchronous copies (cp.async): made when the thread waits for them, at the last moment that the rules allow.
#include <cstring>
#include <deque>
#include <vector>

#include "runtime.h"

namespace kvc {

struct Copy {
    void* to;
    const void* from;
    size_t size;
};
static struct {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
} threads[MAX_THREADS];

void forget_copies() {
    for (auto& thread : threads) {
        thread.open.clear();
        thread.groups.clear();
    }
}

void copy_later(void* to, const void* from, size_t size, Place place) {
    if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size)
        fail(place, "copy_async: addresses %p and %p are not multiples of %zu", to, from, size);
    check_access(from, size, READ, place);
    check_access(to, size, WRITE, place);
    memset(to, 0xff, size);  // nobody can tell what is there until the copy is waited for
    threads[machine.current->linear].open.push_back({to, from, size});
}

void commit_copies() {
    auto& thread = threads[machine.current->linear];
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
}

void wait_copies(int left, Place place) {
    auto& thread = threads[machine.current->linear];
    while (thread.groups.size() > static_cast<size_t>(left)) {
        for (const Copy& copy : thread.groups.front()) {
            check_access(copy.to, copy.size, WRITE, place);
            memcpy(copy.to, copy.from, copy.size);
        }
        thread.groups.pop_front();
    }
}

}  // namespace kvc
