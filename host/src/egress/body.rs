//! An answer's body: whole, or a stream of what is made while it is sent. It never knows how either is written to a socket.

use std::task::{Context, Poll};

use bytes::{Buf, Bytes};

use crate::protocol::Answer;

/// What follows an answer's headers.
pub enum Body {
    /// It is there.
    Whole(Answer),
    /// It comes bit by bit.
    Stream(Box<dyn BodyStream>),
}

/// A body that comes bit by bit. Dropped before its end, its caller has left.
pub trait BodyStream: Send {
    /// The next bytes, some at least; `None` behind the last ones.
    fn poll_next(&mut self, task: &mut Context<'_>) -> Poll<Option<Bytes>>;
}

impl Body {
    /// One that is whole.
    #[must_use]
    pub fn whole(self) -> Option<Answer> {
        match self {
            Self::Whole(answer) => Some(answer),
            Self::Stream(_) => None,
        }
    }

    /// Bytes of one that is whole.
    #[must_use]
    pub fn whole_bytes(&self) -> Option<usize> {
        match self {
            Self::Whole(answer) => Some(answer.remaining()),
            Self::Stream(_) => None,
        }
    }
}

impl Default for Body {
    fn default() -> Self {
        Self::Whole(Answer::default())
    }
}

impl From<Answer> for Body {
    fn from(whole: Answer) -> Self {
        Self::Whole(whole)
    }
}

impl From<Bytes> for Body {
    fn from(whole: Bytes) -> Self {
        Self::Whole(whole.into())
    }
}
