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

}  // namespace

void exchange(Links& links, const Cut& cut) {
  prepare(links, cut);
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
    Links* links = new Links{rank, std::chrono::milliseconds{limit_ms}, 0, {}, {}};
    for (int i = 0; i < num_ranks; ++i) links->links.push_back({i == rank ? -1 : sockets[i], 0, 0, {}});
    return links;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

HEADRACE_EXPORT void headrace_links_free(Links* links) { delete links; }
