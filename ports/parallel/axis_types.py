"""Types of mesh axes: the compiler shards along `Auto`, as everything here is written for."""

from typing import overload

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

AnyMesh = Mesh | AbstractMesh


@overload
def automatic(mesh: None) -> None: ...
@overload
def automatic(mesh: Mesh) -> Mesh: ...
@overload
def automatic(mesh: AbstractMesh) -> AbstractMesh: ...
def automatic(mesh: AnyMesh | None) -> AnyMesh | None:
    """Returns a mesh of the same devices whose axes all have type `Auto`.

    By default `jax.make_mesh` makes axes of type `Explicit`, along which a program has to say how
    each result is sharded. Functions that take a mesh from a user take such a mesh too, and compute
    on this one.

    Raises:
        ValueError: a mesh is given while `jax.set_mesh` has set one with axes of type `Explicit`.
    """
    if mesh is None:
        return None
    check_context()
    if mesh.are_all_axes_auto:
        return mesh
    return mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def check_context() -> None:
    """Checks that nothing keeps arrays on a mesh with axes of type `Auto` from being computed with.

    Raises:
        ValueError: `jax.set_mesh` has set a mesh with axes of type `Explicit`.
    """
    if explicit := jax.sharding.get_abstract_mesh().explicit_axes:
        raise ValueError(
            f"jax.set_mesh has set a mesh with axes of type Explicit ({', '.join(explicit)}), "
            "under which nothing can be computed on another mesh; leave that context, or set a "
            "mesh with axes of type Auto, such as ports.make_mesh makes"
        )
