"""What hosts offer to each other and reach of each other."""

from __future__ import annotations

from headrace.api.run_paths import rank_socket_path
from headrace.fabric.host_messages import SetTunnels
from headrace.fabric.host_routes import HostView, plan_tunnels, socket_path_of

HOME, FAR = "10.0.0.1", "10.0.0.2"
GATEWAY = HostView("gateway-g1", HOME, "10.0.0.1:7001")
NEAR_REPLICA = HostView("chat-1", HOME)
FAR_REPLICA = HostView("chat-2", FAR, "10.0.0.2:7002")


def test_on_one_address_nothing_is_carried() -> None:
    assert plan_tunnels([GATEWAY, NEAR_REPLICA], HOME) == {}
    assert plan_tunnels([], HOME) == {}


def test_each_host_offers_what_it_has_and_reaches_what_the_others_have() -> None:
    assert plan_tunnels([FAR_REPLICA, NEAR_REPLICA, GATEWAY], HOME) == {
        HOME: SetTunnels(["controller", "peer:chat-1", "router:g1"], {"peer:chat-2": "10.0.0.2:7002"}),
        FAR: SetTunnels(
            ["peer:chat-2"],
            dict.fromkeys(["controller", "peer:chat-1", "router:g1"], "10.0.0.1:7001"),
        ),
    }


def test_what_has_no_tunnels_yet_is_not_reached_and_offers_already() -> None:
    plan = plan_tunnels([GATEWAY, HostView("chat-2", FAR)], HOME)
    assert plan[HOME] == SetTunnels(["controller", "router:g1"], {})
    assert plan[FAR].offered == ["peer:chat-2"]
    assert plan[FAR].reached == dict.fromkeys(["controller", "router:g1"], "10.0.0.1:7001")


def test_two_far_hosts_reach_each_others_engines() -> None:
    other = HostView("chat-3", "10.0.0.3", "10.0.0.3:7003")
    plan = plan_tunnels([GATEWAY, FAR_REPLICA, other], HOME)
    assert plan[FAR].reached["peer:chat-3"] == "10.0.0.3:7003"
    assert plan["10.0.0.3"].reached["peer:chat-2"] == "10.0.0.2:7002"


def test_a_name_is_a_path_of_its_own_on_each_host() -> None:
    assert socket_path_of("controller", "/run/a") == "/run/a/controller.sock"
    assert socket_path_of("router:g2", "/run/a") == "/run/a/g2/router.sock"
    assert socket_path_of("peer:chat-1", "/run/b") == "/run/b/peer-chat-1.sock"
    assert socket_path_of("/etc/passwd", "/run/b") == ""


def test_a_gateway_elsewhere_is_asked_for_life_by_the_controller_alone_and_has_its_admin_api() -> None:
    there = HostView("gateway-g1", "10.0.0.3", "10.0.0.3:7003")
    controller = HostView("controller", HOME, "10.0.0.1:7000")
    plan = plan_tunnels([controller, there, FAR_REPLICA], HOME)
    asked = {"alive:g1", "runtime:g1", "relay:g1", "router:g1"}
    assert set(plan[there.address].offered) == asked
    assert plan[there.address].reached == {
        "controller": "10.0.0.1:7000",
        "admin": "10.0.0.1:7000",
        "peer:chat-2": "10.0.0.2:7002",
    }
    assert set(plan[HOME].reached) == {*asked, "peer:chat-2"}
    assert plan[HOME].offered == ["controller", "admin"]
    assert plan[FAR].reached == {"controller": "10.0.0.1:7000", "router:g1": "10.0.0.3:7003"}


def test_replicas_of_an_endpoint_that_is_called_gateway_are_no_gateways() -> None:
    plan = plan_tunnels([GATEWAY, HostView("gateway-1", FAR, "10.0.0.2:7002")], HOME)
    assert plan[FAR].offered == ["peer:gateway-1"]


def test_names_that_lead_elsewhere_have_no_path() -> None:
    assert socket_path_of("admin", "/run/a") == "/run/a/admin-http.sock"
    assert socket_path_of("alive:g2", "/run/a") == "/run/a/g2/alive.sock"
    assert socket_path_of("router:../x", "/run/a") == ""
    assert socket_path_of("runtime:g1/../..", "/run/a") == ""


def test_only_hosts_of_a_replicas_ranks_reach_its_engine() -> None:
    near_rank, far_rank = HostView("chat-1", HOME, rank=1), HostView("chat-1", FAR, "10.0.0.2:7002", rank=2)
    other = HostView("chat-3", "10.0.0.3", "10.0.0.3:7003")
    plan = plan_tunnels([GATEWAY, NEAR_REPLICA, near_rank, far_rank, other], HOME)
    assert plan[HOME].offered == ["controller", "peer:chat-1", "ranks:chat-1", "router:g1"]
    assert plan[FAR].offered == []
    assert plan[FAR].reached["ranks:chat-1"] == "10.0.0.1:7001"
    assert "ranks:chat-1" not in plan["10.0.0.3"].reached
    assert socket_path_of("ranks:chat-1", "/run/b") == rank_socket_path("/run/b", "chat-1")


def test_ranks_beside_their_replica_need_no_tunnel() -> None:
    plan = plan_tunnels([GATEWAY, NEAR_REPLICA, HostView("chat-1", HOME, rank=1), FAR_REPLICA], HOME)
    assert "ranks:chat-1" not in plan[HOME].offered
