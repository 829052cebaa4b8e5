"""The residency machine against a dict model: leases, adversarial completion order, failures, down to one slot."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from offload_moe.schedule.policy import POLICY_NAMES, make_policy
from offload_moe.schedule.residency import Residency, SlotState

NUM_LAYERS, NUM_EXPERTS = 3, 5
KEYS = st.integers(0, NUM_LAYERS * NUM_EXPERTS - 1)


class ResidencyMachine(RuleBasedStateMachine):
    """The model: key -> [slot, is_loading, num_leases]."""

    @initialize(num_slots=st.integers(1, 6), policy=st.sampled_from(POLICY_NAMES))
    def start(self, num_slots: int, policy: str) -> None:
        made = make_policy(policy, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, num_slots=num_slots)
        self.residency = Residency(num_slots, made)
        self.model: dict[int, list[int]] = {}

    def loading(self) -> list[int]:
        return [key for key, entry in self.model.items() if entry[1]]

    @rule(key=KEYS)
    def admit(self, key: int) -> None:
        if key in self.model:
            return
        self.residency.policy.access(key // NUM_EXPERTS, [key])
        slot = self.residency.admit(key)
        movable = [k for k, (_, is_loading, leases) in self.model.items() if not is_loading and not leases]
        is_full = len(self.model) == self.residency.num_slots
        assert (slot is None) == (is_full and not movable)
        if slot is None:
            return
        gone = [k for k, entry in self.model.items() if entry[0] == slot]
        assert gone == [] if not is_full else (len(gone) == 1 and gone[0] in movable)
        for k in gone:
            del self.model[k]
        self.model[key] = [slot, 1, 0]

    @precondition(lambda self: self.loading())
    @rule(data=st.data(), fails=st.booleans())
    def finish(self, data: st.DataObject, fails: bool) -> None:
        key = data.draw(st.sampled_from(self.loading()))
        slot, _, leases = self.model[key]
        if fails and not leases:
            self.residency.abandon(slot)
            del self.model[key]
        else:
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

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "model"):
            return
        slots = [entry[0] for entry in self.model.values()]
        assert len(set(slots)) == len(slots)
        for key in range(NUM_LAYERS * NUM_EXPERTS):
            entry = self.model.get(key)
            assert self.residency.find(key) == (entry[0] if entry else None)
            if entry:
                assert self.residency.state(entry[0]) == (SlotState.LOADING if entry[1] else SlotState.RESIDENT)
                assert self.residency.num_leases(entry[0]) == entry[2]
        assert sorted(self.residency.resident_keys()) == sorted(k for k, entry in self.model.items() if not entry[1])


TestResidency = ResidencyMachine.TestCase
TestResidency.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
