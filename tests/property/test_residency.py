"""The residency machine against a dict model: leases of Python and of token passes, reserved slots, completions in any
order, failures, resizing, one slot."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from offload_moe.native.constants import RESERVED
from offload_moe.native.kernels import SlotTable
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import make_policy, policy_names
from offload_moe.residency.residency import Residency, SlotState

NUM_LAYERS, NUM_EXPERTS = 3, 5
KEYS = st.integers(0, NUM_LAYERS * NUM_EXPERTS - 1)


class ResidencyMachine(RuleBasedStateMachine):
    """The model: key -> [slot, is_loading, num_leases]."""

    @initialize(num_slots=st.integers(1, 6), policy=st.sampled_from(policy_names()))
    def start(self, num_slots: int, policy: str) -> None:
        made = make_policy(policy, ExpertKeys([NUM_EXPERTS] * NUM_LAYERS), num_slots=num_slots)
        self.table = SlotTable(NUM_LAYERS * NUM_EXPERTS, num_slots)
        self.residency = Residency(self.table, made)
        self.leased: set[int] = set()  # by token passes
        self.model: dict[int, list[int]] = {}
        self.reserved: set[int] = set()
        self.num_open = num_slots

    def loading(self) -> list[int]:
        return [key for key, entry in self.model.items() if entry[1]]

    @rule(key=KEYS)
    def admit(self, key: int) -> None:
        if key in self.model:
            return
        self.residency.policy.access(key // NUM_EXPERTS, [key])
        slot = self.take(self.residency.admit(key), may_evict=True)
        if slot is not None:
            self.model[key] = [slot, 1, 0]

    def take(self, slot: int | None, *, may_evict: bool) -> int | None:
        """A slot was asked for: whether it is one that may be had, and what went for it."""
        is_open = {k: entry[0] < self.num_open for k, entry in self.model.items()}
        movable = [
            k
            for k, (_, is_loading, leases) in self.model.items()
            if not is_loading and not leases and is_open[k] and k not in self.leased
        ]
        is_full = sum(is_open.values()) + sum(each < self.num_open for each in self.reserved) == self.num_open
        assert (slot is None) == (is_full and not (movable and may_evict))
        if slot is None:
            return None
        assert slot < self.num_open
        assert slot not in self.reserved
        gone = [k for k, entry in self.model.items() if entry[0] == slot]
        assert gone == [] if not is_full else (len(gone) == 1 and gone[0] in movable)
        for k in gone:
            del self.model[k]
        return slot

    @rule(may_evict=st.booleans())
    def reserve(self, may_evict: bool) -> None:
        slot = self.take(self.residency.reserve(may_evict=may_evict), may_evict=may_evict)
        if slot is not None:
            self.reserved.add(slot)

    @precondition(lambda self: self.reserved)
    @rule(key=KEYS, data=st.data())
    def fill_reserved(self, key: int, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.reserved)))
        if not self.table.admit(key, slot):
            assert key in self.model
            return
        self.residency.num_reserved -= 1
        self.reserved.remove(slot)
        self.model[key] = [slot, 1, 0]

    @precondition(lambda self: any(entry[1] and not entry[2] for entry in self.model.values()))
    @rule(data=st.data())
    def drop_reserved(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(k for k, entry in self.model.items() if entry[1] and not entry[2])))
        slot = self.model.pop(key)[0]
        self.table.reserve(slot)
        self.residency.num_reserved += 1
        self.reserved.add(slot)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def reclaim(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.reserved)))
        self.residency.reclaim(slot)
        self.reserved.remove(slot)

    @precondition(lambda self: self.loading())
    @rule(data=st.data(), fails=st.booleans(), arrives=st.booleans())
    def finish(self, data: st.DataObject, fails: bool, arrives: bool) -> None:
        key = data.draw(st.sampled_from(self.loading()))
        slot, _, leases = self.model[key]
        if fails and not leases:
            self.residency.abandon(slot)
            del self.model[key]
        else:
            if arrives:  # a reader has filled it
                self.table.arrive(slot)
                assert self.residency.state(slot) is SlotState.LOADING
            self.residency.loaded(slot)
            self.model[key][1] = 0

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model)))
        self.residency.lease(self.model[key][0])
        self.model[key][2] += 1

    @precondition(lambda self: any(entry[2] for entry in self.model.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(k for k, entry in self.model.items() if entry[2])))
        self.residency.release(self.model[key][0])
        self.model[key][2] -= 1

    @precondition(lambda self: any(not entry[1] for entry in self.model.values()))
    @rule(data=st.data())
    def lease_by_a_token_pass(self, data: st.DataObject) -> None:
        resident = sorted(key for key, entry in self.model.items() if not entry[1])
        key = data.draw(st.sampled_from(resident))
        if key not in self.leased:
            assert self.table.lease_arrived([key]) == [key]
            self.leased.add(key)

    @rule()
    def end_the_token_pass(self) -> None:
        self.table.release(sorted(self.leased))
        self.leased.clear()

    @precondition(lambda self: self.num_open == self.residency.num_slots)
    @rule(data=st.data())
    def close_slots(self, data: st.DataObject) -> None:
        self.num_open = data.draw(st.integers(1, self.num_open))
        self.residency.close_slots(self.num_open)

    @precondition(lambda self: self.num_open < self.residency.num_slots)
    @rule(gives_up=st.booleans())
    def drain(self, gives_up: bool) -> None:
        is_empty = self.residency.empty_closed_slots()
        closed = [k for k, entry in self.model.items() if entry[0] >= self.num_open]
        in_use = [k for k in closed if self.model[k][1] or self.model[k][2] or k in self.leased]
        assert is_empty == (not in_use and all(slot < self.num_open for slot in self.reserved))
        for key in set(closed) - set(in_use):
            del self.model[key]
        if is_empty:
            self.residency.cut()
        elif gives_up:
            self.residency.open_slots()
        else:
            return
        self.num_open = self.residency.num_slots

    @precondition(lambda self: self.num_open == self.residency.num_slots)
    @rule(more=st.integers(0, 3))
    def grow(self, more: int) -> None:
        self.num_open += more
        self.residency.grow(self.num_open)

    @precondition(lambda self: self.model)
    @rule(policy=st.sampled_from(policy_names()))
    def change_policy(self, policy: str) -> None:
        self.residency.use_policy(make_policy(policy, ExpertKeys([NUM_EXPERTS] * NUM_LAYERS), num_slots=self.num_open))

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "model"):
            return
        assert {slot for slot, state in enumerate(self.table.states) if state == RESERVED} == self.reserved
        slots = [entry[0] for entry in self.model.values()]
        assert len(set(slots)) == len(slots)
        for key in range(NUM_LAYERS * NUM_EXPERTS):
            entry = self.model.get(key)
            assert self.residency.find(key) == (entry[0] if entry else None)
            if entry:
                assert self.residency.state(entry[0]) == (SlotState.LOADING if entry[1] else SlotState.RESIDENT)
                assert self.residency.num_leases(entry[0]) == entry[2]
            assert self.table.is_leased(key) == (key in self.leased)
        assert self.residency.num_reserved == len(self.reserved)
        assert self.residency.num_resident == sum(not entry[1] for entry in self.model.values())
        assert sorted(self.residency.resident_keys()) == sorted(k for k, entry in self.model.items() if not entry[1])


TestResidency = ResidencyMachine.TestCase
TestResidency.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
