#include "team.h"

#include <sched.h>

#include <atomic>
#include <chrono>
#include <memory>

#include "runtime.h"
#include "thrown.h"

namespace mbn {

struct Team {
  // How many pieces of a member's share are taken from its front, and, times kBack, from its back.
  struct alignas(64) Taken {
    std::atomic<int64_t> pieces{0};
  };
  std::unique_ptr<Taken[]> taken;
  std::atomic<int64_t> joined{0};  // kShare for each share of the work that has come, one for each thread; -1: closed
  std::atomic<int64_t> size{0};    // 0: not closed yet
  std::atomic<int64_t> waiting{0}, round{0};
  Thrown thrown;
  std::atomic<bool> broken{false};  // a member has thrown, which no other may wait for
};

namespace {

struct Broken {};  // what the other members throw

constexpr int64_t kShare = int64_t{1} << 32, kBack = int64_t{1} << 32;

// The thread pool promises neither that threads start at once nor that they run at the same time: the first to come waits so long for the others.
// Whoever comes later finds the work done.
constexpr std::chrono::microseconds kPatience{500};

template <class F>
void spin_until(const F& done) {
  for (int64_t spins = 0; !done(); ++spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spins > 4096) sched_yield();  // the thread that is waited for may need this processor
  }
}

void join(Team& team, int64_t shares, int64_t all, void (*body)(const Member&, void*), void* context) {
  int64_t joined = team.joined.load();
  do {
    if (joined < 0) return;
  } while (!team.joined.compare_exchange_weak(joined, joined + shares * kShare + 1));
  const int64_t rank = joined % kShare;
  if (rank == 0) {
    const auto begin = std::chrono::steady_clock::now();
    spin_until([&] { return team.joined.load() / kShare == all || std::chrono::steady_clock::now() - begin > kPatience; });
    team.size.store(team.joined.exchange(-1) % kShare);
  } else {
    spin_until([&] { return team.size.load() > 0; });
  }
  if (team.thrown.by([&] { body({rank, team.size.load(), &team}, context); })) team.broken.store(true);
}

}  // namespace

void run_team(void (*body)(const Member&, void*), void* context) {
  const int64_t all = thread_count();
  if (all == 1) return body({}, context);
  struct Call {
    Team team;
    int64_t all;
    void (*body)(const Member&, void*);
    void* context;
  } call = {{}, all, body, context};
  call.team.taken.reset(new Team::Taken[size_t(all)]);
  run_parallel(
      all,
      [](int64_t begin, int64_t end, void* given) {
        Call& c = *static_cast<Call*>(given);
        join(c.team, end - begin, c.all, c.body, c.context);
      },
      &call);
  call.team.thrown.rethrow();
}

void meet(const Member& member) {
  if (member.size == 1) return;
  Team& team = *member.team;
  const int64_t round = team.round.load();
  if (team.waiting.fetch_add(1) + 1 == member.size) {
    team.waiting.store(0);
    for (int64_t i = 0; i < member.size; ++i) team.taken[size_t(i)].pieces.store(0);
    team.round.store(round + 1);
  } else {
    spin_until([&] { return team.round.load() != round || team.broken.load(); });
    if (team.round.load() == round) throw Broken{};
  }
}

int64_t take_piece(const Member& member, int64_t pieces) {
  for (int64_t i = 0; i < member.size; ++i) {
    const int64_t who = (member.rank + i) % member.size;
    const Range own = share(pieces, who, member.size);
    std::atomic<int64_t>& taken = member.team->taken[size_t(who)].pieces;
    for (int64_t found = taken.load(); found % kBack + found / kBack < own.end - own.begin;) {
      if (!taken.compare_exchange_weak(found, found + (i == 0 ? 1 : kBack))) continue;
      return i == 0 ? own.begin + found % kBack : own.end - 1 - found / kBack;
    }
  }
  return -1;
}

}  // namespace mbn
