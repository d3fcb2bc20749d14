//! A call that was let in: who asks, until when, and what it holds of the host's limits. It never knows what is asked.

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use hyper::{HeaderMap, header::HeaderName};
use parking_lot::Mutex;
use tonic::{Response, Status};

use super::methods::{Kind, Method};
use crate::{
    access::{AccessError, Caller, Visibility},
    audit::{Action, Effect},
    egress::{Refusal, denied_status, job_status, status_of},
    ingress::{
        Context,
        endpoints::OpenTo,
        exchange::Exchange,
        peer::Peer,
        refusal::refuse,
        request_headers::{self, Head, Headers},
        request_timings::RequestTimings,
    },
    work::{Deadline, Detail, JobError, RequestId},
};

/// How long its caller waits.
const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// Digits of a number there.
const TIMEOUT_DIGITS_MAX: usize = 8;

/// A call that was let in.
pub(super) struct GrpcCall {
    pub(super) exchange: Arc<Exchange>,
    pub(super) caller: Caller,
    pub(super) id: RequestId,
    pub(super) begun: Instant,
    /// When one request in it has had its time.
    pub(super) deadline: Deadline,
    /// When its caller wants nothing of it any more, where it has said so.
    pub(super) ends_at: Option<Instant>,
    /// Of a call in which each message is let in by itself.
    headers: HeaderMap,
    pub(super) method: &'static Method,
    /// Where the time went, of the one request of a call that runs a pipeline.
    pub(super) timings: Mutex<Option<Box<RequestTimings>>>,
    /// It was counted with the model that it asked.
    pub(super) is_counted: AtomicBool,
    visibility: Visibility,
}

/// A message that was let in, until its request is answered.
pub(super) struct Admitted {
    pub(super) caller: Caller,
    _permit: RequestPermit,
}

/// Why one wasn't.
pub(super) enum NotAdmitted {
    Denied(AccessError),
    Busy(JobError),
}

impl NotAdmitted {
    pub(super) fn status(&self) -> Status {
        match self {
            Self::Denied(denied) => denied_status(denied),
            Self::Busy(busy) => job_status(busy),
        }
    }
}

/// A place among the requests in flight.
struct RequestPermit(Arc<Peer>);

impl RequestPermit {
    fn enter(peer: &Arc<Peer>) -> Result<Self, JobError> {
        peer.context.gate.enter()?.keep();
        Ok(Self(Arc::clone(peer)))
    }
}

impl Drop for RequestPermit {
    fn drop(&mut self) {
        self.0.context.gate.leave_request();
    }
}

impl GrpcCall {
    /// Lets a call in: its caller, where it isn't everybody's, and a permit among the requests in flight where it runs a pipeline.
    ///
    /// # Errors
    /// Why its caller isn't let in, or has to come back.
    pub(super) fn admit(
        exchange: &Arc<Exchange>,
        head: &Head<'_>,
        id: &RequestId,
        method: &'static Method,
    ) -> Result<Self, Status> {
        let (context, begun) = (&*exchange.context, Instant::now());
        let shown = Headers(&head.headers);
        let action =
            |effect| Action { method: head.method.as_str(), endpoint: method.path, name: "", effect };
        if context.access.is_keyless()
            && let Err(foreign) = context.pages.check(head)
        {
            context.audit.refused(action(Effect::Look), None, &exchange.from, 403);
            return Err(Status::permission_denied(foreign.to_string()));
        }
        let admitted = match method.open_to {
            OpenTo::Everybody => Ok(Caller::default()),
            OpenTo::Callers => context.access.admit(&exchange.from, &shown),
            OpenTo::Management => context.access.manage(&exchange.from, &shown),
        };
        let mut caller = admitted.map_err(|denied| {
            let _ = refuse(context, &exchange.from, action(Effect::Look), &denied);
            denied_status(&denied)
        })?;
        let timings = (method.kind == Kind::Infer)
            .then(|| RequestTimings::of(exchange, head, &caller, method.path))
            .flatten();
        if method.kind == Kind::Infer
            && let Err(busy) = exchange.enter()
        {
            if let Some(timings) = timings {
                let _ = timings.end(context, begun, "", id, status_of(&busy));
            }
            return Err(job_status(&busy));
        }
        let is_stream = method.kind == Kind::StreamInfer;
        if is_stream {
            // Its messages are let in one by one, and take the places that there are for its key.
            caller.permit = None;
        }
        exchange.keep(caller.permit.as_ref());
        // Of two that its caller has named, the earlier one.
        let own = timeout(head).map_err(|error| job_status(&error))?.map(|timeout| begun + timeout);
        let Deadline(usual) = request_headers::deadline(&head.known, &context.server, begun)
            .map_err(|error| job_status(&error))?;
        let named = head.known.request_timeout.map(|_| usual);
        let ends_at = own.into_iter().chain(named).min();
        let longest = begun + context.server.request_timeout_max;
        let deadline = Deadline(ends_at.unwrap_or(usual).min(longest));
        let headers = if is_stream { head.headers.clone() } else { HeaderMap::new() };
        let visibility = match method.open_to {
            OpenTo::Everybody => context.access.visibility(&exchange.from, &shown).unwrap_or_else(|wrong| {
                let _ = refuse(context, &exchange.from, action(Effect::Look), &wrong);
                Visibility::Status
            }),
            _ if caller.manages => Visibility::Reasons,
            _ => Visibility::Names,
        };
        Ok(Self {
            exchange: Arc::clone(exchange),
            caller,
            id: id.clone(),
            begun,
            deadline,
            ends_at,
            headers,
            method,
            timings: Mutex::new(timings),
            is_counted: AtomicBool::new(false),
            visibility,
        })
    }

    /// Lets one message of a stream in, as a request by itself, before it is read.
    ///
    /// # Errors
    /// Its caller isn't let in any more, or has to come back.
    pub(super) fn admit_message(&self) -> Result<Admitted, NotAdmitted> {
        let shown = Headers(&self.headers);
        let caller = self.context().access.admit(&self.exchange.from, &shown).map_err(NotAdmitted::Denied)?;
        let permit = RequestPermit::enter(self.exchange.peer()).map_err(NotAdmitted::Busy)?;
        Ok(Admitted { caller, _permit: permit })
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.exchange.context
    }

    /// How much its caller may see of the host's state.
    pub(super) fn visibility(&self) -> Visibility {
        self.visibility
    }

    /// Carries out a call that changes something, or reads settings, and has it in the audit log.
    pub(super) async fn audited<T>(
        &self,
        name: &str,
        effect: Effect,
        work: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<Response<T>, Status> {
        let action = Action { method: "POST", endpoint: self.method.path, name, effect };
        let underway = self.context().audit.begin(action, &self.caller, &self.exchange.from);
        match work.await {
            Ok(answer) => {
                underway.answered(200);
                Ok(Response::new(answer))
            }
            Err(refusal) => {
                let status = refusal.into_status();
                underway.answered(http_status(&status));
                Err(status)
            }
        }
    }
}

/// A call's status as one of HTTP, where logs and metrics have those.
pub(super) fn http_status(status: &Status) -> u16 {
    use tonic::Code;
    match status.code() {
        Code::Ok => 200,
        Code::InvalidArgument | Code::OutOfRange => 400,
        Code::Unauthenticated => 401,
        Code::PermissionDenied => 403,
        Code::NotFound => 404,
        Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => 409,
        Code::ResourceExhausted => 429,
        Code::Cancelled => 499,
        Code::Unimplemented => 501,
        Code::Unavailable => 503,
        Code::DeadlineExceeded => 504,
        Code::Unknown | Code::Internal | Code::DataLoss => 500,
    }
}

/// The time that a caller gives a call, as gRPC writes it: at most eight digits and a unit.
fn timeout(head: &Head<'_>) -> Result<Option<Duration>, JobError> {
    let Some(value) = head.headers.get(TIMEOUT) else { return Ok(None) };
    let read = || {
        let text = value.to_str().ok()?;
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        let fits = (1..=TIMEOUT_DIGITS_MAX).contains(&digits.len())
            && digits.bytes().all(|digit| digit.is_ascii_digit());
        let number: u64 = digits.parse().ok().filter(|_| fits)?;
        Some(match unit {
            "H" => Duration::from_secs(number * 3600),
            "M" => Duration::from_secs(number * 60),
            "S" => Duration::from_secs(number),
            "m" => Duration::from_millis(number),
            "u" => Duration::from_micros(number),
            "n" => Duration::from_nanos(number),
            _ => return None,
        })
    };
    read().map(Some).ok_or_else(|| {
        JobError::Invalid(vec![Detail {
            loc: vec!["header".into(), TIMEOUT.as_str().into()],
            msg: format!("expected at most 8 digits and one of H, M, S, m, u, n, found {value:?}"),
            kind: "value_error".into(),
        }])
    })
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;

    #[test]
    fn a_timeout_is_digits_and_a_unit() {
        let read = |text: &str| {
            let request = Request::builder().header(TIMEOUT, text).body(()).unwrap();
            timeout(&Head::of(&request.into_parts().0)).map_err(|_| ())
        };
        for (text, expected) in [
            ("501m", Duration::from_millis(501)),
            ("2S", Duration::from_secs(2)),
            ("1M", Duration::from_secs(60)),
            ("99999999H", Duration::from_secs(99_999_999 * 3600)),
            ("7u", Duration::from_micros(7)),
            ("0n", Duration::ZERO),
        ] {
            assert_eq!(read(text), Ok(Some(expected)), "{text}");
        }
        for wrong in ["", "m", "5", "5x", "-5m", "+5m", "1.5S", "123456789m", "5 m"] {
            assert_eq!(read(wrong), Err(()), "{wrong}");
        }
    }
}
