#include "links.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include <chrono>
#include <cstring>
#include <new>
#include <vector>

#include "export.h"

namespace headrace {
namespace {

using Clock = std::chrono::steady_clock;
// Partners on two hosts come some ten microseconds apart, as long as a packet takes.
constexpr std::chrono::microseconds kSpin{64};
constexpr int kSliceMs = 5;
// In the place of a rank in a header: what follows is a command of rank 0, and `meeting` its number.
constexpr uint32_t kCommand = UINT32_MAX;

struct Header {
  uint32_t meeting;
  uint32_t rank;
  uint64_t num_bytes;
};

struct Link {
  int socket;
  size_t sent, received;
  std::vector<char> in;
};

struct Piece {
  char* at;
  size_t num_bytes;
};

Piece piece_of(const Cut& cut, int rank, int row) {
  char* at = cut.rows + row * cut.row_bytes;
  if (cut.owners != nullptr) return {at, cut.owners[row] == rank ? static_cast<size_t>(cut.row_bytes) : 0};
  const int64_t unit = cut.unit_bytes, first = cut.starts[rank] * unit, end = cut.starts[rank + 1] * unit;
  return {at + first, static_cast<size_t>(end - first)};
}

size_t bytes_of(const Cut& cut, int rank) {
  size_t sum = 0;
  for (int row = 0; row < cut.num_rows; ++row) sum += piece_of(cut, rank, row).num_bytes;
  return sum;
}

bool is_later(ssize_t status) {
  return status < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR);
}

}  // namespace

struct Links {
  int rank;
  std::chrono::milliseconds limit;
  uint32_t meeting;
  std::vector<char> out;
  std::vector<Link> links;  // one per rank; the own one has no socket
  Header command{};         // the command that is received, and how much of it is there, this header included
  size_t command_received = 0;

  bool is_open(const Link& link) const {
    return link.socket >= 0 && (link.sent < out.size() || link.received < link.in.size());
  }
};

namespace {

void prepare(Links& links, const Cut& cut) {
  links.meeting += 1;
  links.out.resize(sizeof(Header) + bytes_of(cut, links.rank));
  const Header header{links.meeting, static_cast<uint32_t>(links.rank), links.out.size() - sizeof(Header)};
  std::memcpy(links.out.data(), &header, sizeof header);
  char* to = links.out.data() + sizeof header;
  for (int row = 0; row < cut.num_rows; ++row) {
    const Piece piece = piece_of(cut, links.rank, row);
    std::memcpy(to, piece.at, piece.num_bytes);
    to += piece.num_bytes;
  }
  for (size_t rank = 0; rank < links.links.size(); ++rank) {
    Link& link = links.links[rank];
    if (link.socket < 0) continue;
    link.sent = link.received = 0;
    link.in.resize(sizeof(Header) + bytes_of(cut, static_cast<int>(rank)));
  }
}

// Whether something could be sent or received.
bool move(Links& links, Link& link) {
  bool has_moved = false;
  if (link.sent < links.out.size()) {
    const ssize_t sent = send(link.socket, links.out.data() + link.sent, links.out.size() - link.sent,
                              MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && !is_later(sent)) throw RanksApart{Wait::broken};
    if (sent > 0) link.sent += static_cast<size_t>(sent), has_moved = true;
  }
  if (link.received < link.in.size()) {
    const ssize_t got =
        recv(link.socket, link.in.data() + link.received, link.in.size() - link.received, MSG_DONTWAIT);
    if (got == 0 || (got < 0 && !is_later(got))) throw RanksApart{Wait::broken};
    if (got > 0) link.received += static_cast<size_t>(got), has_moved = true;
  }
  return has_moved;
}

void sleep_until_some_can(const Links& links) {
  pollfd ends[kMaxRanks];
  nfds_t count = 0;
  for (const Link& link : links.links) {
    if (!links.is_open(link)) continue;
    const int events = (link.sent < links.out.size() ? POLLOUT : 0) |
                       (link.received < link.in.size() ? POLLIN : 0);
    ends[count++] = {link.socket, static_cast<short>(events), 0};
  }
  poll(ends, count, kSliceMs);
}

void fill_in(const Links& links, const Cut& cut, int rank) {
  const Link& link = links.links[static_cast<size_t>(rank)];
  Header header;
  std::memcpy(&header, link.in.data(), sizeof header);
  // Another header: that rank is in another step than this one, and nothing that it says is meant for this one.
  if (header.meeting != links.meeting || header.rank != static_cast<uint32_t>(rank) ||
      header.num_bytes != link.in.size() - sizeof header)
    throw RanksApart{Wait::broken};
  const char* from = link.in.data() + sizeof header;
  for (int row = 0; row < cut.num_rows; ++row) {
    const Piece piece = piece_of(cut, rank, row);
    std::memcpy(piece.at, from, piece.num_bytes);
    from += piece.num_bytes;
  }
}

// Return when all is sent and received. Throws RanksApart.
void move_all(Links& links) {
  const auto begin = Clock::now();
  auto moved = begin;
  for (bool is_done = false; !is_done;) {
    bool has_moved = false;
    is_done = true;
    for (Link& link : links.links) {
      if (!links.is_open(link)) continue;
      has_moved |= move(links, link);
      is_done &= !links.is_open(link);
    }
    const auto now = Clock::now();
    if (has_moved) {
      moved = now;
    } else if (!is_done && now - moved >= kSpin) {
      if (now - begin >= links.limit) throw RanksApart{Wait::too_long};
      sleep_until_some_can(links);
    }
  }
}

// Receive what there is of rank 0's next command; whether it is whole.
bool take_command(Links& links, uint32_t number, char* into, size_t capacity) {
  const int from = links.links[0].socket;
  while (true) {
    const size_t got = links.command_received;
    const bool has_header = got >= sizeof(Header);
    if (has_header && (links.command.meeting != number || links.command.rank != kCommand ||
                       links.command.num_bytes > capacity))
      throw RanksApart{Wait::broken};  // another one than the next: nothing that it says can be believed
    const size_t whole = sizeof(Header) + (has_header ? links.command.num_bytes : 0);
    if (has_header && got == whole) return true;
    char* to = has_header ? into + (got - sizeof(Header)) : reinterpret_cast<char*>(&links.command) + got;
    const ssize_t more = recv(from, to, whole - got, MSG_DONTWAIT);
    if (more == 0 || (more < 0 && !is_later(more))) throw RanksApart{Wait::broken};
    if (more < 0) return false;
    links.command_received += static_cast<size_t>(more);
  }
}

void await_command(Links& links, uint32_t number, char* into, size_t capacity, std::chrono::microseconds spin,
                   std::chrono::milliseconds limit) {
  const auto begin = Clock::now();
  while (!take_command(links, number, into, capacity)) {
    const auto waited = Clock::now() - begin;
    if (waited < spin) continue;
    const bool has_begun = links.command_received > 0;
    const auto rest = std::chrono::ceil<std::chrono::milliseconds>((has_begun ? links.limit : limit) - waited);
    if (rest.count() <= 0) throw RanksApart{has_begun ? Wait::broken : Wait::too_long};
    pollfd end{links.links[0].socket, POLLIN, 0};
    poll(&end, 1, static_cast<int>(rest.count()));
  }
  links.command_received = 0;
}

}  // namespace

void exchange(Links& links, const Cut& cut) {
  prepare(links, cut);
  move_all(links);
  for (size_t rank = 0; rank < links.links.size(); ++rank)
    if (links.links[rank].socket >= 0) fill_in(links, cut, static_cast<int>(rank));
}

int missing(const Links& links) {
  for (size_t rank = 0; rank < links.links.size(); ++rank)
    if (links.is_open(links.links[rank])) return static_cast<int>(rank);
  return -1;
}

}  // namespace headrace

using namespace headrace;

// sockets [num_ranks]: connected ones, which stay the caller's; -1 for this rank. Null: memory ran out.
HEADRACE_EXPORT Links* headrace_links_new(const int32_t* sockets, int num_ranks, int rank, int limit_ms) {
  try {
    Links* links = new Links{rank, std::chrono::milliseconds{limit_ms}, 0, {}, {}, {}, 0};
    for (int i = 0; i < num_ranks; ++i) links->links.push_back({i == rank ? -1 : sockets[i], 0, 0, {}});
    return links;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

// Rank 0: send command `number` to all others. 0: it is on its way; 1: memory ran out; 2: a rank was lost; 3: one
// does not take it within the limit.
HEADRACE_EXPORT int headrace_links_post(Links* links, uint32_t number, const char* command, size_t num_bytes) {
  try {
    const Header header{number, kCommand, num_bytes};
    links->out.resize(sizeof header + num_bytes);
    std::memcpy(links->out.data(), &header, sizeof header);
    std::memcpy(links->out.data() + sizeof header, command, num_bytes);
    for (Link& link : links->links) {
      link.sent = link.received = 0;
      link.in.clear();
    }
    move_all(*links);
    return 0;
  } catch (const RanksApart& apart) {
    return static_cast<int>(apart.why);
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Another rank: wait for command `number`. 0: it is in `into`; 2: a rank was lost, or said something else; 3: not
// within the limit.
HEADRACE_EXPORT int headrace_links_await(Links* links, uint32_t number, char* into, size_t capacity, int spin_us,
                                         int limit_ms) {
  try {
    await_command(*links, number, into, capacity, std::chrono::microseconds{spin_us},
                  std::chrono::milliseconds{limit_ms});
    return 0;
  } catch (const RanksApart& apart) {
    return static_cast<int>(apart.why);
  }
}

HEADRACE_EXPORT void headrace_links_free(Links* links) { delete links; }
