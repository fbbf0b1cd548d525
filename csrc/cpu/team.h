// Threads that go through one piece of work side by side, meeting at barriers: an evaluation has some sixty short phases, and a call of the thread pool
// for each would cost as much as a small network.
#pragma once

#include <cstdint>

namespace mbn {

struct Team;
struct Member {
  int64_t rank = 0, size = 1;
  Team* team = nullptr;
};

// Calls body(member, context) in each of PyTorch's threads that takes part, all of them at the same time. There may be fewer than thread_count().
void run_team(void (*body)(const Member&, void*), void* context);

// Returns when every member has come here.
void meet(const Member& member);

}  // namespace mbn
