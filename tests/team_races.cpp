// Teams (csrc/cpu/team.cpp) on std::thread in the place of PyTorch's pool, for ThreadSanitizer, which does not know OpenMP's barriers.
// team_races THREADS SECONDS: work that reads what other members wrote, with nothing but the meetings between. Prints how many meetings there were.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "runtime.h"
#include "team.h"

namespace {

// As many threads as there are processors would rarely be in each other's way: they wait for work by yielding.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
  }
  ~Pool() {
    stop_.store(true);
    generation_.fetch_add(1);
    for (std::thread& worker : workers_) worker.join();
  }
  // Share i of the work goes to thread owner[i]; a thread may come late, or take several shares, one after the other.
  void run(const std::vector<int>& owner, const std::function<void(int64_t)>& share) {
    owner_ = &owner, share_ = &share;
    left_.store(workers_.size());
    generation_.fetch_add(1);
    take_part(0);
    while (left_.load() > 0) std::this_thread::yield();
  }

 private:
  void take_part(int thread) {
    for (size_t i = 0; i < owner_->size(); ++i) {
      if ((*owner_)[i] == thread) (*share_)(int64_t(i));
    }
  }
  void serve(int thread) {
    for (int seen = 0;;) {
      while (generation_.load() == seen) std::this_thread::yield();
      ++seen;
      if (stop_.load()) return;
      take_part(thread);
      left_.fetch_sub(1);
    }
  }
  const std::vector<int>* owner_ = nullptr;
  const std::function<void(int64_t)>* share_ = nullptr;
  std::atomic<int> generation_{0};
  std::atomic<size_t> left_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

int threads;
Pool* pool;
std::mt19937 choose(1);

constexpr int64_t kPhases = 40, kPieces = 23;

// Ordinary memory: that two members touch it is a race unless a meeting lies between.
struct Work {
  int64_t value[kPieces] = {}, taken[kPieces] = {};
  std::atomic<int64_t> meetings{0}, wrong{0}, ended{0};
  int64_t throws_at = 0, thrower = 0;  // a phase, 0: none, and a rank, which the team may not have
};

void body(const mbn::Member& member, void* given) {
  Work& work = *static_cast<Work*>(given);
  for (int64_t phase = 1; phase <= kPhases; ++phase) {
    if (phase % 2) {
      for (int64_t i = 0; i < kPieces && member.size == 1; ++i) work.value[i] = phase, ++work.taken[i];
      for (int64_t i; member.size > 1 && (i = mbn::take_piece(member, kPieces)) >= 0;) work.value[i] = phase, ++work.taken[i];
    } else {
      const mbn::Range own = mbn::share(kPieces, member.rank, member.size);
      for (int64_t i = own.begin; i < own.end; ++i) work.value[i] = phase, ++work.taken[i];
    }
    if (phase == work.throws_at && member.rank == work.thrower) throw work.thrower;
    mbn::meet(member);
    for (int64_t i = 0; i < kPieces; ++i) {
      if (work.value[i] != phase || work.taken[i] != phase) work.wrong.fetch_add(1);
    }
    mbn::meet(member);
  }
  if (member.rank == 0) work.meetings.fetch_add(2 * kPhases);
  work.ended.fetch_add(1);
}

}  // namespace

namespace mbn {
int64_t thread_count() { return threads; }
void run_parallel(int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<int> owner;
  const bool all_at_once = choose() % 4 > 0;
  for (int64_t i = 0; i < tasks; ++i) owner.push_back(int(all_at_once ? i : choose() % threads));
  pool->run(owner, [=](int64_t i) { body(i, i + 1, context); });
}
}  // namespace mbn

int main(int, char** arguments) {
  threads = std::atoi(arguments[1]);
  const double seconds = std::atof(arguments[2]);
  Pool all(threads);
  pool = &all;
  int64_t meetings = 0;
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() < seconds) {
    Work work;
    if (choose() % 4 == 0) work.throws_at = 1 + int64_t(choose() % kPhases), work.thrower = int64_t(choose() % unsigned(threads));
    int64_t thrown = -1;
    try {
      mbn::run_team(body, &work);
    } catch (int64_t thrower) {
      thrown = thrower;
    }
    meetings += work.meetings.load();
    if (work.wrong.load() > 0) {
      std::printf("%lld numbers are not what the phase wrote\n", static_cast<long long>(work.wrong.load()));
      return 1;
    }
    // Either everybody has come to the end, or nobody and the caller knows why.
    if ((thrown >= 0) == (work.ended.load() > 0) || (thrown >= 0 && thrown != work.thrower) || (thrown >= 0 && work.throws_at == 0)) {
      std::printf("%lld members ended, thrown: %lld\n", static_cast<long long>(work.ended.load()), static_cast<long long>(thrown));
      return 1;
    }
  }
  std::printf("%lld meetings\n", static_cast<long long>(meetings));
}
