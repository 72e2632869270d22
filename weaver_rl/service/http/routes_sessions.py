"""Sessions: a client's visit, its heartbeat and the numbers that it reports of itself."""

from __future__ import annotations

from datetime import UTC

from fastapi import APIRouter
from starlette.responses import Response

from weaver_rl.service.calls import NewSession
from weaver_rl.service.http.answers import SessionAnswer
from weaver_rl.service.http.routes_scope import check_scope
from weaver_rl.service.http.routing import FaceOf, Id, JsonRoute, Owner, answered, documented
from weaver_rl.service.http.wire import MetricBody, MetricsBody, NewSessionBody
from weaver_rl.service.records import SessionMetric

router = APIRouter(route_class=JsonRoute, tags=["sessions"])


@router.post("/sessions", **documented(SessionAnswer, 201))
async def create_session(face: FaceOf, owner: Owner, body: NewSessionBody) -> Response:
    """Begins a visit."""
    check_scope(body.organization_id, body.project_id)
    # Clients compare what they get with what they sent, so that it is kept as it came.
    policy = None if body.scheduling_policy is None else body.scheduling_policy.model_dump(exclude_unset=True)
    new = NewSession(
        name=body.name,
        sdk_version=body.sdk_version,
        tags=tuple(body.tags),
        labels=body.labels or {},
        user_metadata=body.user_metadata or {},
        scheduling_policy=policy,
    )
    return answered(SessionAnswer.of(await face.service.create_session(owner, new)), 201)


@router.get("/sessions/{session_id}", **documented(SessionAnswer))
async def get_session(face: FaceOf, owner: Owner, session_id: Id) -> Response:
    """A visit."""
    return answered(SessionAnswer.of(await face.service.session(owner, session_id)))


@router.post("/sessions/{session_id}/heartbeat", **documented(None, 204))
async def heartbeat(face: FaceOf, owner: Owner, session_id: Id) -> Response:
    """The client is still there."""
    await face.service.heartbeat(owner, session_id)
    return Response(status_code=204)


@router.post("/sessions/{session_id}/metrics", **documented(None, 204))
async def add_metrics(face: FaceOf, owner: Owner, session_id: Id, body: MetricsBody) -> Response:
    """Numbers of the client's own loop."""
    await face.service.add_metrics(owner, session_id, [_metric(session_id, metric) for metric in body.metrics])
    return Response(status_code=204)


def _metric(session_id: str, metric: MetricBody) -> SessionMetric:
    at = metric.occurred_at if metric.occurred_at.tzinfo is not None else metric.occurred_at.replace(tzinfo=UTC)
    return SessionMetric(
        session_id=session_id,
        model_id=metric.model_id,
        name=metric.name,
        value=metric.value,
        step=metric.step,
        occurred_at=at.isoformat(),
        labels={name: value if isinstance(value, str) else str(value) for name, value in metric.labels.items()},
    )
