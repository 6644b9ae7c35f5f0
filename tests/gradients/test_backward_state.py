"""The state of backward passes: what waits for its reduction, and what was changed meanwhile."""

import weakref

from reducing import made, parameters_of

from dpoptim.gradients.backward_state import BackwardState, EndOfBackward


def test_a_backward_has_raised_when_its_end_is_gone():
    state, ended = BackwardState(), []
    end = EndOfBackward(ended.append, 7)
    state.tasks[7] = weakref.ref(end)
    state.tasks[8] = None  # ended inside another
    assert not state.has_raised()
    end()
    assert ended == [7]
    del end
    assert state.has_raised()


def test_which_local_gradient_was_rewritten():
    tensors = made((2,), (3,), grads=[1.0, 1.0])
    parameters, state = parameters_of(*tensors), BackwardState()
    state.local |= {index: tensor.grad._version for index, tensor in enumerate(tensors)}
    state.find_rewritten(parameters)
    assert state.rewritten is None
    tensors[1].grad.mul_(2)
    state.find_rewritten(parameters)
    assert state.rewritten == "b"
    state.tasks[0] = None
    state.find_rewritten(parameters)
    assert state.rewritten is None, "a backward that is under way may add to it"
    state.tasks.clear()
    tensors[1].grad = None
    state.find_rewritten(parameters)
    assert state.rewritten is None


def test_a_backward_that_is_forgotten_leaves_what_is_local():
    state = BackwardState()
    arrived, tasks = state.arrived, state.tasks
    state.tasks[0], state.was_reduced = None, True
    state.arrived.append(3)
    state.local[1], state.num_no_sync, state.num_raised = 0, 2, 1
    state.forget()
    assert (state.tasks, state.arrived, state.was_reduced) == ({}, [], False)
    assert (state.local, state.num_no_sync) == ({1: 0}, 2)
    state.end_reduction()
    assert (state.local, state.num_no_sync, state.was_reduced) == ({}, 0, True)
    assert state.num_raised == 1, "all of them are compared with the other ranks'"
    assert state.arrived is arrived, "which the reducer has too"
    assert state.tasks is tasks
