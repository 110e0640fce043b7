// One adapter for both front ends: it turns what torch.ops or Python passes into what the operations of ops.h take.
#pragma once
#include <array>
#include <tuple>
#include <utility>

#include "ops.h"

namespace sam {

// How a front end passes an argument for a parameter of type P: In, and Held, which is made from that and the
// argument's name, converts to P and lives as long as the call.
template <class I, class P>
struct PassedAs {
  using In = I;
  struct Held {
    In value;
    const char* /*name*/ _;
    operator P() const { return value; }
  };
};
template <class Front, class P>
struct Argument : PassedAs<P, P> {};

// A front end has Running, which lives while the operation runs, and Arguments of its own.
template <class Front, auto op>
struct Call;

template <class Front, class R, class... P, R (*op)(const Hook&, P...)>
struct Call<Front, op> {
  using Names = std::array<const char*, sizeof...(P)>;
  template <class Q>
  using In = typename Argument<Front, Q>::In;
  template <class Q>
  using Held = typename Argument<Front, Q>::Held;

  static R run(In<P>... args) { return with({}, {}, args...); }

  static R with(const Hook& hook, const Names& names, In<P>... args) {
    return [&]<size_t... I>(std::index_sequence<I...>) {
      const std::tuple<Held<P>...> held(Held<P>{args, names[I]}...);
      const typename Front::Running running;
      return op(hook, std::get<I>(held)...);
    }(std::index_sequence_for<P...>());
  }
};

}  // namespace sam
