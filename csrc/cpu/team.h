// Threads that go through one piece of work side by side, meeting at barriers: an evaluation has some sixty short phases, and a call of the thread pool
// for each would cost as much as a small network.
#pragma once

#include <cstdint>

#include "types.h"

namespace mbn {

struct Range {
  int64_t begin, end;
};
// Part i of n of [0, count): parts differ by one at most, so that no thread is left with the largest.
MBN_INLINE Range share(int64_t count, int64_t i, int64_t n) { return {count * i / n, count * (i + 1) / n}; }

struct Team;
struct Member {
  int64_t rank = 0, size = 1;
  Team* team = nullptr;
};

// Calls body(member, context) in each of PyTorch's threads that takes part, all of them at the same time. There may be fewer than thread_count().
// Where a member throws, the others stop at their next meeting, and the caller gets what it threw.
void run_team(void (*body)(const Member&, void*), void* context);

// Returns when every member has come here.
void meet(const Member& member);

// The next of `pieces` pieces of work, or -1 when all are taken: first those of this member's own share, in order, then what others have left of theirs, from its
// end. Processors that others use too are not equally fast. Members of a team share one piece of work between two meetings.
int64_t take_piece(const Member& member, int64_t pieces);

}  // namespace mbn
