//! Asks a candidate's golden requests on a thread of its own, within a time. It never knows what follows.

use std::{sync::Arc, time::Duration};

use modalkit_engine::EndedBy;
use tokio::sync::{mpsc, oneshot};

use super::Event;
use crate::{
    config::GoldenSpec,
    pipeline::{Golden, GoldenError, SharedInstance},
};

/// Asks a loaded instance golden requests on a thread of its own.
pub(super) struct Ask {
    pub(super) number: u64,
    pub(super) limit: Duration,
    pub(super) myself: mpsc::WeakSender<Event>,
}

impl Ask {
    /// Asks, and tells the machine what came of it.
    pub(super) async fn golden(self, spec: GoldenSpec, instance: SharedInstance) {
        let (done, asked) = oneshot::channel();
        let asking = Arc::downgrade(&instance);
        let ask = move || {
            let asked = Golden::read(&spec.file, spec.latency_max).and_then(|golden| golden.ask(&**instance));
            // Before the answer, so that nobody waits for this look at the instance.
            drop(instance);
            // The receiver is gone when the limit has passed.
            let _ = done.send(asked);
        };
        let asked = match std::thread::Builder::new().name("golden".into()).spawn(ask) {
            Ok(_) => tokio::time::timeout(self.limit, asked).await,
            Err(source) => {
                Ok(Ok(Err(GoldenError::Unreadable { path: "a thread to ask them".into(), source })))
            }
        };
        let asked = match asked {
            Ok(Ok(asked)) => asked,
            Ok(Err(_)) | Err(_) => {
                // In a process of its own it hangs no longer.
                let hanging = asking.upgrade();
                let process = hanging.as_ref().and_then(|instance| instance.process());
                process.into_iter().for_each(|process| process.kill("golden requests hung", EndedBy::Itself));
                Err(GoldenError::Hung { limit: self.limit })
            }
        };
        if let Some(myself) = self.myself.upgrade() {
            let _ = myself.send(Event::Asked(self.number, asked)).await;
        }
    }
}
